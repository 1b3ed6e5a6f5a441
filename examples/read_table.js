// Where to cut a prompt, from `kvr-partition export table.json --format router`, with nothing but JSON.
//
//     node examples/read_table.js router.json RANKS CONTEXT

const [file, ranks, context] = process.argv.slice(2).map((word, at) => (at ? +word : word));
const table = JSON.parse(require("fs").readFileSync(file, "utf8"));
if (table.schema !== "kvr-partition/router/1") throw new Error(`unknown schema ${table.schema}`);

const routes = table.routes.filter((route) => route.ranks === ranks && route.past === 0);
const below = routes.filter((route) => route.context <= context).pop();
const above = routes.find((route) => route.context >= context);
if (!below || !above) throw new Error(`nothing was searched on both sides of ${context} tokens`);

const span = above.context - below.context;
const weight = span ? (context - below.context) / span : 0;
const cuts = below.cuts.map((cut, at) => cut + weight * (above.cuts[at] - cut));
const quantum = Math.min(below.quantum, above.quantum);
console.log((quantum === 1 ? nearest() : dealt()).join("/"));

// Every boundary at the nearest token.
function nearest() {
  const ends = cuts.map((cut) => Math.floor(cut * context + 0.5));
  return [...ends, context].map((end, at, all) => end - (at ? all[at - 1] : 0));
}

// Whole quanta; those left over go to the chunks that grow least by one.
function dealt() {
  const quanta = Math.ceil(context / quantum);
  const edges = [...cuts.map((cut) => (cut * context) / quantum), quanta];
  const ideal = edges.map((edge, at) => edge - (at ? edges[at - 1] : 0));
  const counts = ideal.map(Math.floor);
  const growth = (at) => (counts[at] ? (counts[at] + 1) / ideal[at] : 0);
  const order = counts.map((_, at) => [growth(at), at]).sort((one, other) => one[0] - other[0]);
  const left = quanta - counts.reduce((sum, count) => sum + count, 0);
  for (const [, at] of order.slice(0, left)) counts[at] += 1;
  counts[counts.length - 1] -= quanta - context / quantum;
  return counts.map((count) => Math.round(count * quantum));
}
