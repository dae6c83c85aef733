"""Damages headers of tiny GGUF files: each one must be read, or refused in one line, in little time and memory.

    python scripts/fuzz_gguf.py --mutants 10000 --seed 0

Each mutant is one of the base files with flipped bits, an edited value or type of a key, other counts, a cut, or bytes
put in, left out or doubled. It is converted as `nanokv pull FILE.gguf` does, and the config that comes out is read. A
violation is an exception that is not a NanokvError, a message of several lines or over 400 characters, more than 2 s of
CPU time or 1 GiB of memory, or a process that dies or hangs. Exits with 1 where there is one, and prints the seed and
number of the mutant: `--only N` repeats it. The mutants run in child processes, a few hundred in each.
"""

from __future__ import annotations

import argparse
import json
import random
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

CPU_SECONDS, MEMORY, CHARACTERS = 2.0, 1 << 30, 400
HANG = 120
"""Seconds of silence after which a child counts as hanging; generous, for a busy machine."""
BATCH = 500
NUMBERS = (0, 1, 2, 3, 7, 255, 256, 65_536, 10**8, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63, 2**64 - 1)

KEYS = (
    b"general.architecture", b"block_count", b"context_length", b"embedding_length", b"feed_forward_length",
    b"head_count", b"head_count_kv", b"rms_epsilon", b"freq_base", b"dimension_count", b"key_length_mla",
    b"kv_lora_rank", b"expert_count", b"expert_used_count", b"expert_shared_count", b"expert_group_count",
    b"leading_dense_block_count", b"ggml.model", b"ggml.pre", b"ggml.tokens", b"ggml.token_type", b"ggml.merges",
    b"ggml.scores", b"bos_token_id", b"eos_token_id", b"chat_template", b"factor", b"scaling.type",
)  # fmt: skip


def bases(folder: Path) -> list[Path]:
    """Tiny valid files: byte-level and SentencePiece vocabularies, experts, latent attention."""
    import gguf
    import oracles
    import tiny_gguf

    paths = [folder / f"base{i}.gguf" for i in range(4)]
    tiny_gguf.write(paths[0])
    tokens = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *"helo",
        "he",
        "ll",
        "hell",
        "hello",
        "",
    ]

    def pieces(writer: gguf.GGUFWriter) -> None:
        for key in ("pre", "merges", "add_bos_token"):
            writer.kv_data[0].pop(f"tokenizer.ggml.{key}")
        for key, value in (("model", "llama"), ("tokens", tokens), ("scores", [-float(i) for i in range(len(tokens))]),
                           ("token_type", [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259))):  # fmt: skip
            tiny_gguf.replaced(f"tokenizer.ggml.{key}", value)(writer)

    tiny_gguf.write(paths[1], edit=pieces)
    for path, (family, arch, fields) in zip(
        paths[2:], (("qwen3_moe", "qwen3moe", {"mlp_only_layers": []}), ("deepseek_v3", "deepseek2", {})), strict=True
    ):
        source = oracles.checkpoint(family, folder / family, vocab_size=len(tiny_gguf.TOKENS), **fields)
        tiny_gguf.from_checkpoint(path, source, arch)
    return paths


def header_size(data: bytes) -> int:
    """The bytes before the first tensor's data, but for the padding."""
    from nanokv.hub.gguf_header import read_header

    with tempfile.NamedTemporaryFile(suffix=".gguf") as file:
        file.write(data)
        file.flush()
        _, tensors = read_header(Path(file.name))
        return len(data) - sum(stored.data.nbytes for stored in tensors.values())


def mutant(data: bytes, header: int, rng: random.Random) -> bytes:
    """`data` with one to three damages."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        kind, at = rng.randrange(13), rng.randrange(4, header)
        if kind == 0:  # bits
            for _ in range(rng.choice((1, 1, 2, 8))):
                out[rng.randrange(min(header, len(out)))] ^= 1 << rng.randrange(8)
        elif kind == 1:  # a number of any width anywhere
            width = rng.choice((1, 2, 4, 8))
            out[at : at + width] = (rng.choice(NUMBERS) % 256**width).to_bytes(width, "little")
        elif kind == 2:  # the type of a key
            at = _after_a_key(out, rng)
            out[at : at + 4] = struct.pack("<I", rng.choice((*range(14), 255)))
        elif kind in (3, 9, 10):  # its value
            at, width = _after_a_key(out, rng) + 4, rng.choice((1, 4, 4, 4, 8))
            out[at : at + width] = (rng.choice(NUMBERS) % 256**width).to_bytes(width, "little")
        elif kind in (11, 12):  # a letter of a text
            letters = [i for i in rng.sample(range(header), 64) if i < len(out) and 32 < out[i] < 127]
            if letters:
                out[letters[0]] = rng.randrange(33, 127)
        elif kind == 4:  # a cut
            del out[rng.choice((at, rng.randrange(4, max(5, len(out))))) :]
        elif kind == 5:  # bytes left out
            del out[at : at + rng.choice((1, 4, 8, 100))]
        elif kind == 6:  # bytes put in
            out[at:at] = rng.randbytes(rng.choice((1, 4, 8, 100)))
        elif kind == 7:  # bytes doubled
            out[at:at] = out[at : at + rng.choice((8, 24, 200))]
        elif kind == 8:  # the counts of tensors and keys
            place = rng.choice((4, 8, 16))
            out[place : place + 4] = struct.pack("<I", rng.choice(NUMBERS) % 2**32)
    return bytes(out)


def _after_a_key(data: bytearray, rng: random.Random) -> int:
    """The place after a key's name, where its type is."""
    name = rng.choice(KEYS)
    place = data.find(name)
    return place + len(name) if place >= 0 else rng.randrange(4, max(5, len(data)))


def run_one(data: bytes, folder: Path) -> tuple[str, str | None]:
    """Converts one mutant. Returns "read" or "refused", and what it violates."""
    from nanokv.core.errors import NanokvError
    from nanokv.hub.gguf import convert
    from nanokv.models.read import read_folder

    path = folder / "mutant.gguf"
    path.write_bytes(data)
    start = time.process_time()
    try:
        with tempfile.TemporaryDirectory(dir=folder) as model:
            convert(path, Path(model), {}, lambda *_: None)
            read_folder(model)
        outcome, wrong = "read", None
    except NanokvError as error:
        message = str(error).replace(str(folder), "")
        outcome, wrong = "refused", None
        if "\n" in message or len(message) > CHARACTERS:
            wrong = f"message of {len(message)} characters: {message[:200]!r}"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        outcome, wrong = "failed", f"{type(error).__name__}: {str(error)[:200]}"
    if (seconds := time.process_time() - start) > CPU_SECONDS:
        wrong = wrong or f"{seconds:.1f} s of CPU time"
    return outcome, wrong


def peak_memory() -> int:
    """Bytes of the largest resident set so far; 0 where the system does not say."""
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def child(folder: Path, seed: int, first: int, count: int) -> None:
    """Runs mutants first, first + 1, ...; prints a line of JSON for each, and its number before it starts."""
    import torch

    from nanokv.hub import gguf  # noqa: F401  (what a pull imports is not memory of a mutant)

    torch.set_num_threads(1)
    files = [path.read_bytes() for path in sorted(folder.glob("base*.gguf"))]
    headers = [header_size(data) for data in files]
    with tempfile.TemporaryDirectory() as own:
        for data in files:
            outcome, wrong = run_one(data, Path(own))
            assert outcome == "read" and (wrong is None or "CPU" in wrong), (outcome, wrong)
        before = peak_memory()
        for number in range(first, first + count):
            print(json.dumps({"start": number}), flush=True)
            rng = random.Random(f"{seed}-{number}")
            base = rng.randrange(len(files))
            outcome, wrong = run_one(mutant(files[base], headers[base], rng), Path(own))
            if wrong is None and (grown := peak_memory() - before) > MEMORY:
                wrong, before = f"{grown / 2**20:.0f} MiB of memory", peak_memory()
            print(json.dumps({"number": number, "outcome": outcome, "wrong": wrong}), flush=True)
        print(json.dumps({"grown": peak_memory() - before}), flush=True)


def fuzz(folder: Path, seed: int, first: int, count: int) -> tuple[Counter[str], list[str], int]:
    """Runs all mutants in children. Returns the outcomes, the violations, and the most memory that a child grew by."""
    outcomes: Counter[str] = Counter()
    violations, grown, number, last = [], 0, first, first + count
    while number < last:
        batch = min(BATCH, last - number)
        command = [sys.executable, __file__, "--child", str(folder), "--seed", str(seed), "--only", str(number),
                   "--mutants", str(batch)]  # fmt: skip
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, bufsize=1)
        assert process.stdout is not None
        started, done = None, number
        silent = threading.Timer(10 * HANG, process.kill)  # imports and the base files
        silent.start()
        for line in process.stdout:
            silent.cancel()
            silent = threading.Timer(HANG, process.kill)
            silent.start()
            report = json.loads(line)
            started = report.get("start", started)
            grown = max(grown, report.get("grown", 0))
            if "number" in report:
                done = report["number"] + 1
                outcomes[report["outcome"]] += 1
                if report["wrong"]:
                    violations.append(f"mutant {report['number']}: {report['wrong']}")
        silent.cancel()
        code = process.wait()
        if code or done < number + batch:
            if started is None:
                raise RuntimeError(f"a child ended with {code} before its first mutant")
            outcomes["failed"] += 1
            violations.append(f"mutant {started}: the process ended with {code}, or was silent for {HANG} s")
            done = started + 1
        number = done
        if sys.stderr.isatty():
            print(f"\r{number - first} of {count}", end="", file=sys.stderr, flush=True)
    return outcomes, violations, grown


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Damages headers of tiny GGUF files: each is read, or refused in one line, within 2 s and 1 GiB.",
        epilog="Example: python scripts/fuzz_gguf.py --mutants 10000 --seed 0",
    )
    parser.add_argument("--mutants", type=int, default=1000, help="how many (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, help="of the damages (default: 0)")
    parser.add_argument("--only", type=int, metavar="N", help="begin with mutant N; alone: run this one")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        child(options.child, options.seed, options.only, options.mutants)
        return 0
    first, count = (0, options.mutants) if options.only is None else (options.only, 1)
    with tempfile.TemporaryDirectory() as folder:
        bases(Path(folder))
        outcomes, violations, grown = fuzz(Path(folder), options.seed, first, count)
    parts = ", ".join(f"{number} {outcome}" for outcome, number in outcomes.most_common())
    print(f"{count} mutants, seed {options.seed}: {parts}; {len(violations)} violations; {grown / 2**20:.0f} MiB grown")
    for line in violations[:20]:
        print(line)
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
