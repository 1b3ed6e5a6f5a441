"""Run a prompt: KV-Runahead prefill on all ranks, then greedy decoding on the last one.

The text of a prompt needs a tokenizer in the model folder. Without one, give token ids, or a context to
fill with random tokens.

Examples:
  kvr-partition generate --context 1536 --table kvr-runs/quickstart-llama-2xcpu-float32/table.json
  kvr-partition generate --model my-llama --prompt "Once upon a time" --max-new-tokens 64
"""

from __future__ import annotations

import argparse
import random
import sys
from typing import TYPE_CHECKING, Any

from kvr_partition.cli.options import add_output, add_ranks, make_group, model_folder, need_at_least
from kvr_partition.errors import OutOfRangeError, PartitionError, UnsupportedError
from kvr_partition.loading import load
from kvr_partition.partition import Partition
from kvr_partition.predictor import PartitionPredictor
from kvr_partition.provenance import weights_line
from kvr_partition.table import PartitionTable

if TYPE_CHECKING:
    from profiler.ranks import RankGroup


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of ``generate``."""
    group = parser.add_argument_group("generate")
    what = group.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", help="text; - reads it from stdin")
    what.add_argument("--prompt-ids", metavar="IDS", help="token ids, like 1,17,42")
    what.add_argument("--context", type=int, help="so many random tokens")
    group.add_argument("--max-new-tokens", type=int, default=32, help="tokens to decode (default 32)")
    how = group.add_mutually_exclusive_group()
    how.add_argument(
        "--table",
        metavar="FILE",
        help="take the partition from this table or predictor (default: the bundled predictor that was trained on "
        "this very model and hardware, else an even split)",
    )
    how.add_argument("--partition", metavar="SIZES", help="use this split, like 9728/6656")
    add_ranks(parser)
    add_output(parser)


class _Shown:
    """Tokens as they come, on the terminal where they are streamed."""

    def __init__(self, tokenizer: Any, streams: bool) -> None:
        self.tokens: list[int] = []
        self.times: list[float] = []
        self._tokenizer, self._streams = tokenizer, streams
        self._text = ""

    def take(self, token: int, at_s: float) -> None:
        """A token, so many seconds after the prefill began."""
        self.tokens.append(token)
        self.times.append(at_s)
        if self._streams:
            # Detokenise everything so far: one token may be half a character or change its neighbour.
            plain = self._tokenizer is None
            text = " ".join(map(str, self.tokens)) if plain else str(self._tokenizer.decode(self.tokens))
            sys.stdout.write(text[len(self._text) :])
            sys.stdout.flush()
            self._text = text


def run(options: argparse.Namespace) -> None:
    """Prefill, decode, and say how long each took."""
    need_at_least("max-new-tokens", options.max_new_tokens, 1)
    planner = load(options.table) if options.table else None
    group = make_group(options)
    streams = options.format == "text"

    from kvr_partition.runtime.loading import load_tokenizer

    tokenizer = load_tokenizer(model_folder(options.model)) if options.prompt is not None else None
    ids = _prompt_ids(options, tokenizer, group.geometry.vocab_size)
    partition, source = Partition.even(len(ids), options.ranks), "even"
    if options.partition is not None:
        partition, source = Partition.parse(options.partition, len(ids)), "given"
    elif planner is not None:
        partition, source = _asked(planner, len(ids), options.ranks)

    shown = _Shown(tokenizer, streams)
    with group:
        if streams and group.weights != "checkpoint":
            # Told to whoever is quiet too: nothing in the text itself shows that it means nothing.
            print(f"{weights_line(group.weights)}; the tokens mean nothing", file=sys.stderr)
        if planner is None and options.partition is None and options.ranks > 1:
            partition, source = _bundled(group, partition, options.quiet)
        group.warm_up(partition)
        group.generate(ids, partition, options.max_new_tokens, shown.take)
    tokens, times = shown.tokens, shown.times
    per_token = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None
    if options.format == "json":
        from kvr_partition.cli.show import print_json

        print_json(
            {
                "context": len(ids),
                "sizes": partition.sizes,
                "partition_source": source,
                "weights": group.weights,
                "tokens": tokens,
                "text": None if tokenizer is None else tokenizer.decode(tokens),
                "ttft_s": times[0],
                "time_per_output_token_s": per_token,
            }
        )
        return
    print()
    if not options.quiet:
        from kvr_partition.cli.show import seconds

        decoding = "" if per_token is None else f", then {seconds(per_token)} per token"
        print(
            f"{len(ids)} tokens as {partition} ({source}): first token after {seconds(times[0])}{decoding}",
            file=sys.stderr,
        )


def _asked(planner: PartitionTable | PartitionPredictor, context: int, ranks: int) -> tuple[Partition, str]:
    found = (
        planner.lookup(context, ranks=ranks)
        if isinstance(planner, PartitionTable)
        else planner.predict(context, ranks=ranks)
    )
    return found.partition, str(found.source)


def _bundled(group: RankGroup, even: Partition, quiet: bool) -> tuple[Partition, str]:
    """What the bundled predictor for this model and hardware says; the even split, and why, where none fits."""
    from kvr_partition.bundled import matching_predictor

    predictor, reason = matching_predictor(group.provenance)
    if predictor is not None:
        try:
            partition, source = _asked(predictor, even.context, even.ranks)
        except OutOfRangeError as error:
            reason = str(error)
        else:
            return partition, f"{source} by {reason}"
    if not quiet:
        print(f"even split: {reason}", file=sys.stderr)
    return even, "even"


def _prompt_ids(options: argparse.Namespace, tokenizer: Any, vocabulary: int) -> list[int]:
    from kvr_partition.runtime.support import check_tokens

    if tokenizer is not None:
        text = sys.stdin.read() if options.prompt == "-" else options.prompt
        ids = [int(token) for token in tokenizer(text)["input_ids"]]
        beyond = next((token for token in ids if not 0 <= token < vocabulary), None)
        if beyond is not None:
            raise UnsupportedError(
                f"the tokenizer makes token {beyond} of this prompt, which is not in the model's vocabulary of "
                f"{vocabulary}; give the folder the tokenizer that belongs to the model"
            )
    elif options.prompt_ids is not None:
        try:
            ids = [int(part) for part in options.prompt_ids.split(",")]
        except ValueError:
            raise PartitionError(f"token ids are written as 1,17,42; got {options.prompt_ids!r}") from None
        check_tokens(ids, vocabulary)
    else:
        need_at_least("context", options.context, 1)
        draw = random.Random(options.seed)
        ids = [draw.randrange(vocabulary) for _ in range(options.context)]
    if not ids:
        raise PartitionError("the prompt is empty; give at least one token per rank")
    return ids
