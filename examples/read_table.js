// Where to cut a prompt, from `kvr-partition export table.json --format router`, with nothing but JSON.
//
//     node examples/read_table.js router.json RANKS CONTEXT

const [file, ranks, context] = process.argv.slice(2);
const table = JSON.parse(require("fs").readFileSync(file, "utf8"));
if (table.schema !== "kvr-partition/router/1") throw new Error(`unknown schema ${table.schema}`);

const routes = table.routes.filter((route) => route.ranks === +ranks && route.past === 0);
const below = routes.filter((route) => route.context <= context).pop();
const above = routes.find((route) => route.context >= context);
if (!below || !above) throw new Error(`nothing was searched on both sides of ${context} tokens`);

const span = above.context - below.context;
const weight = span ? (context - below.context) / span : 0;
const ends = below.cuts.map((cut, at) => Math.floor((cut + weight * (above.cuts[at] - cut)) * context + 0.5));
console.log([...ends, +context].map((end, at, all) => end - (at ? all[at - 1] : 0)).join("/"));
