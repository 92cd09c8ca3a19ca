"""Small models with something to forget: a T5 and a BART that denoise, a Llama-shaped decoder that continues.

    python benchmarks/pretrain_small.py --data FOLDER --out FOLDER [--models t5 bart llama] [--width 256] [--steps 2000]

Every text file in the folder (`.txt`, `.md`, `.jsonl` with a column `text`) is cut into pieces of `--words` words at
most. The models learn them by the project's own loop, each by its own objective, with a vocabulary of their own, and
are written as plain `transformers` folders, `OUT/t5` and so on, with `pretraining.json` beside the weights: nats a
target on pieces that were held out, before and after. Any command takes such a folder as its model. Interrupted, the
same command goes on.
"""

import argparse
import json
import random
import shutil
import time
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path

from retain import distributed
from retain.data.rendering import Renderer
from retain.methods.full import Full
from retain.models.decoder import DecoderFamily
from retain.models.family import Family, pretrained
from retain.models.seq2seq import Seq2SeqFamily
from retain.parameters import num_bytes
from retain.strategies import Strategy
from retain.task_view import BoundTask
from retain.train_config import TrainConfig
from retain.trainer import train_task
from retain.types import Example, StepInfo

LEARNED_FROM = 20_000
"""Pieces that the vocabulary is learned from: more change little."""


def families(arguments: argparse.Namespace) -> dict[str, Family]:
    """What can be made, by its folder's name."""
    sizes = {"d_model": arguments.width, "num_layers": arguments.layers, "num_heads": arguments.heads}
    vocab, longest = arguments.vocab_size, arguments.max_length
    return {
        "t5": Seq2SeqFamily(architecture="t5", vocab_size=vocab, **sizes),
        "bart": Seq2SeqFamily(architecture="bart", vocab_size=vocab, max_position_embeddings=2 * longest, **sizes),
        "llama": DecoderFamily(
            architecture="llama", hidden_size=arguments.width, num_hidden_layers=2 * arguments.layers,
            num_attention_heads=arguments.heads, vocab_size=vocab, max_position_embeddings=2 * longest,
        ),
    }  # fmt: skip


def texts(folder: Path) -> Iterator[str]:
    """Every text of the folder's files, in the order of their names."""
    for path in sorted(path for path in folder.rglob("*") if path.suffix in (".jsonl", ".md", ".txt")):
        whole = path.read_text(encoding="utf-8", errors="replace")
        if path.suffix == ".jsonl":
            rows = (json.loads(line) for line in whole.splitlines() if line.strip())
            yield from (row["text"] for row in rows if isinstance(row.get("text"), str))
        else:
            yield whole


def pieces(folder: Path, *, words: int, most: int, seed: int) -> list[Example]:
    """The texts cut into pieces, in random order, none twice."""
    found: dict[str, Example] = {}
    for text in texts(folder):
        split = text.split()
        for start in range(0, len(split), words):
            piece = " ".join(split[start : start + words])
            key = blake2b(piece.encode(), digest_size=8).hexdigest()
            found[key] = Example(key, text=piece)
    rows = list(found.values())
    random.Random(seed).shuffle(rows)
    return rows[:most]


def pretrain(name: str, family: Family, rows: list[Example], arguments: argparse.Namespace) -> dict[str, object]:
    """Train one model and write it; what is known of it."""
    held_out, learned = rows[: arguments.held_out], rows[arguments.held_out :]
    model, tokenizer = family.create(learned[:LEARNED_FROM], seed=arguments.seed)
    method = Full()
    precision = distributed.resolve_precision("auto")
    view = BoundTask(
        name=name, examples=learned, family=family, renderer=Renderer(tokenizer), method=method,
        max_length=arguments.max_length, max_tokens=arguments.tokens_per_pass, packed=family.isolates_documents,
        precision=precision, seed=arguments.seed, on_overflow="truncate",
    )  # fmt: skip
    config = TrainConfig(
        learning_rate=arguments.learning_rate, max_steps=arguments.steps, per_device_train_batch_size=arguments.rows,
        max_tokens_per_batch=arguments.tokens_per_pass, max_length=arguments.max_length, on_overflow="truncate",
        lr_scheduler_type="cosine", weight_decay=0.01, adam_beta2=0.98, seed=arguments.seed,
        save_steps=arguments.save_steps,
    )  # fmt: skip

    def show(info: StepInfo) -> None:
        if info.step % max(arguments.steps // 20, 1) == 0:
            print(f"{name} {info.step}/{info.num_steps} loss {info.loss:.3f} epoch {info.epoch:.2f}", flush=True)

    model = method.apply(model.to(distributed.device()))
    before, started = view.mean_loss(model, held_out), time.perf_counter()
    folder: Path = arguments.out / name
    checkpoints: Path = arguments.out / f".{name}-checkpoints"
    result = train_task(model, view, strategy=Strategy(), config=config, observers=[show], folder=checkpoints)
    after = view.mean_loss(result.model, held_out)
    pretrained(result.model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    shutil.rmtree(checkpoints, ignore_errors=True)
    facts: dict[str, object] = {
        "model": name, "parameters": sum(parameter.numel() for parameter in result.model.parameters()),
        "megabytes": num_bytes(result.model.parameters()) / 1e6, "pieces": len(learned), "steps": result.num_steps,
        "tokens": sum(info.num_tokens for info in result.history), "seconds": time.perf_counter() - started,
        "held_out_nats_before": before, "held_out_nats_after": after, "precision": precision,
    }  # fmt: skip
    (folder / "pretraining.json").write_text(json.dumps(facts, indent=2), encoding="utf-8")
    return facts


def main() -> None:
    """Read the texts, train each model, say what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=["t5", "bart", "llama"], choices=["t5", "bart", "llama"])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4, help="of either half; a decoder has twice as many")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--words", type=int, default=80, help="of a piece")
    parser.add_argument("--pieces", type=int, default=200_000, help="at most")
    parser.add_argument("--held-out", type=int, default=200)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--rows", type=int, default=32, help="of a step")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--max-length", type=int, default=160)
    parser.add_argument("--tokens-per-pass", type=int, default=4096)
    parser.add_argument("--save-steps", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rows = pieces(arguments.data, words=arguments.words, most=arguments.pieces, seed=arguments.seed)
    if len(rows) <= arguments.held_out:
        parser.error(f"{arguments.data} gives {len(rows)} pieces, and {arguments.held_out} are held out")
    made = families(arguments)
    for name in arguments.models:
        facts = pretrain(name, made[name], rows, arguments)
        print(json.dumps(facts))


if __name__ == "__main__":
    main()
