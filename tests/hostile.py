"""Thousands of spoiled copies of saved models, each loaded: refused by name, or a model that works.

    python tests/hostile.py WORK BEGIN END FOLDER...    # cases BEGIN ... END - 1, in WORK

It is a process of its own, so that a crash is seen for what it is. Each case follows from its
number alone, and is printed before it is tried: one that fails is tried again by its number.
"""

import collections
import contextlib
import faulthandler
import io
import json
import logging
import os
import random
import resource
import signal
import struct
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM

from smoothquant import CheckpointError, load_quantized
from smoothquant.core.tensor_files import CONFIG, INDEX, STORED_DTYPES
from smoothquant.core.tensors import DTYPES

GENERATION = "generation_config.json"
HANGS = 300  # seconds; a busy machine may stall for one
MEMORY = 8 << 30  # bytes
TOKENS = torch.arange(3, 11)[None]
# transformers itself reads all that is no tensor of the method's
READERS = [load_quantized] * 3 + [AutoModelForCausalLM.from_pretrained]

ANYTHING = [
    None, True, False, 0, -1, 1, 7, 2**31, 2**63, 10**400, 0.5, -0.0, 1e308, float("nan"),
    float("inf"), "", "a", "__all__", "../../x", "\u0661", "int4", "float32", [], {}, [[]], ["a"],
    {"a": {}}, "9" * 5000,
]  # fmt: skip
PLACES = ["../outside.safetensors", "/etc/passwd", "", ".", "..", "x.bin", "x/y.safetensors", "\0"]
LENGTHS = [0, 1, 8, 2**31, 100_000_001, 2**63 - 1, 2**63, 2**64 - 1]
OFFSETS = [0, 1, 7, 2**32, 2**63, 2**64 - 1, -1]
SIZES = [0, 1, 3, -1, 2**31, 2**32, 2**63, 1.5]
KINDS = [*STORED_DTYPES, "F8_E4M3", "F4", "C64", "f32", "", "I4"]
# By the last part of a tensor's name, values that no kernel may see.
NO_FLOATS = [float("nan"), float("inf"), float("-inf")]
NO_VALUES = {
    "perm": [-1, 2**31 - 1, -(2**31), 10**6],
    "scales": [*NO_FLOATS, -1.0],
    "salient_scales": [*NO_FLOATS, -1.0],
    "salient_weight": NO_FLOATS,
    "bias": NO_FLOATS,
    "qweight": [0x08, 0x80, 0x00, 0x0F],
}


class Saved:
    """A folder of a model, taken apart."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
        self.config = json.loads(self.files[CONFIG])
        self.manifest = self.config.pop("quantization_config")
        self.shards = {
            name: unpacked(data)
            for name, data in self.files.items()
            if name.endswith(".safetensors")
        }
        self.linears = [
            (name, key)
            for name, (header, _) in self.shards.items()
            for key in header
            if key.rpartition(".")[0] in self.manifest["linears"]
        ]


class Case(NamedTuple):
    """A spoiled copy of a folder.

    files: what is another than in the folder: bytes, a path that a link leads to, or None for none.
    blamed: a tensor that must be named; None where the copy may be as good as the folder.
    read: by what it is read.
    """

    files: dict[str, bytes | Path | None]
    blamed: str | None = None
    read: Callable = load_quantized


def unpacked(data: bytes) -> tuple[dict, bytes]:
    """Header and payload of a safetensors file."""
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def packed(header: object, payload: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + payload


def places(value, path=()) -> Iterator[tuple]:
    """The path of every value inside a JSON value."""
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield (*path, key)
            yield from places(value[key], (*path, key))


def mutated(value, rng: random.Random):
    """A copy of a JSON value in which one to three places are replaced, dropped or swapped."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        inside = list(places(value))
        if not inside:
            break
        *path, key = rng.choice(inside)
        parent = value
        for step in path:
            parent = parent[step]
        action = rng.randrange(4)
        if action == 0:
            del parent[key]
        elif action == 1:
            other = rng.choice(list(parent)) if isinstance(parent, dict) else 0
            parent[key], parent[other] = parent[other], parent[key]
        elif action == 2 and isinstance(parent, dict):
            parent[rng.choice(["", "x", "..", f"{key}.{key}", str(key)[:-1]])] = parent[key]
        else:
            parent[key] = rng.choice(ANYTHING)
    return value


# ---- Ways to spoil a folder: (saved, rng) -> Case


def model_fields(saved: Saved, rng: random.Random) -> Case:
    changed = mutated(saved.config, rng)
    return Case({CONFIG: json.dumps({**changed, "quantization_config": saved.manifest}).encode()})


def manifest_fields(saved: Saved, rng: random.Random) -> Case:
    manifest = mutated(saved.manifest, rng)
    return Case({CONFIG: json.dumps({**saved.config, "quantization_config": manifest}).encode()})


def other_json(saved: Saved, rng: random.Random) -> Case:
    name = rng.choice([n for n in (INDEX, GENERATION) if n in saved.files])
    return Case({name: json.dumps(mutated(json.loads(saved.files[name]), rng)).encode()})


def index_outside(saved: Saved, rng: random.Random) -> Case:
    """An index that has a tensor where it is not."""
    places = {key: name for name, (header, _) in saved.shards.items() for key in header}
    places.pop("__metadata__", None)
    blamed = rng.choice(list(places))
    places[blamed] = rng.choice(
        [*PLACES, *(name for name in saved.shards if name != places[blamed])]
    )
    return Case({INDEX: json.dumps({"weight_map": places}).encode()}, blamed)


def header_fields(saved: Saved, rng: random.Random) -> Case:
    name = rng.choice(list(saved.shards))
    header, payload = saved.shards[name]
    header = json.loads(json.dumps(header))
    key = rng.choice([key for key in header if key != "__metadata__"])
    entry, way = header[key], rng.randrange(7)
    if way == 0:
        header = mutated(header, rng)
    elif way == 1:
        entry["data_offsets"][rng.randrange(2)] = rng.choice(OFFSETS)
    elif way == 2:  # over another one's bytes
        shift = rng.choice([-4, -1, 1, 4])
        entry["data_offsets"] = [at + shift for at in entry["data_offsets"]]
    elif way == 3:
        entry["dtype"] = rng.choice(KINDS)
    elif way == 4:
        entry["shape"] = [rng.choice(SIZES) for _ in range(rng.randrange(5))]
    elif way == 5:
        twice = json.dumps({key: rng.choice([entry, header[rng.choice(list(header))]])})
        return Case({name: packed((json.dumps(header)[:-1] + ", " + twice[1:]).encode(), payload)})
    else:
        size = rng.choice([*LENGTHS, len(json.dumps(header)) + rng.choice([-1, 1])])
        return Case({name: struct.pack("<Q", size) + saved.files[name][8:]})
    return Case({name: packed(header, payload)})


def values(saved: Saved, rng: random.Random) -> Case:
    """A value in a sound file that no kernel may see."""
    begin, end, key = 0, 0, ""
    # INT8 tables have no salient weights, and take any byte for two codes.
    while begin == end or key.endswith(("packed.qweight", "lm_head.qweight")):
        name, key = rng.choice(saved.linears)
        header, payload = saved.shards[name]
        begin, end = header[key]["data_offsets"]
    dtype = DTYPES[STORED_DTYPES[header[key]["dtype"]]]
    leaf, data = key.rpartition(".")[2], bytearray(payload)
    tensor = torch.frombuffer(
        data, dtype=dtype, count=(end - begin) // dtype.itemsize, offset=begin
    )
    at, other = rng.sample(range(len(tensor)), 2)
    if leaf == "perm" and rng.random() < 0.5:
        tensor[at] = tensor[other]
    else:
        tensor[at] = -128 if dtype == torch.int8 else rng.choice(NO_VALUES[leaf])
    return Case({name: packed(header, data)}, key, rng.choice(READERS))


def tensors(saved: Saved, rng: random.Random) -> Case:
    """A sound file with a tensor too few, too many, of another dtype or of another shape."""
    name = rng.choice(list(saved.shards))
    header, payload = saved.shards[name]
    parts = {
        key: (entry["dtype"], entry["shape"], payload[slice(*entry["data_offsets"])])
        for key, entry in header.items()
        if key != "__metadata__"
    }
    blamed = rng.choice(list(parts))
    kind, shape, data = parts[blamed]
    way = rng.randrange(5)
    if way == 0:
        del parts[blamed]
    elif way == 1:
        blamed = rng.choice(["x", "../../x", f"{blamed}.weight", "model.layers.9.up.perm", ""])
        parts[blamed] = (kind, shape, data)
    elif way == 2:
        parts[blamed] = (kind, rng.choice([[1, *shape], [*shape, 1]]), data)
    elif way == 3:
        size = DTYPES[STORED_DTYPES[kind]].itemsize
        parts[blamed] = (kind, [len(data) // size + 1], data + bytes(size))
    else:
        kinds = [k for k in STORED_DTYPES if k != kind]
        other = rng.choice(kinds)
        count = len(data) // DTYPES[STORED_DTYPES[kind]].itemsize
        parts[blamed] = (other, shape, bytes(count * DTYPES[STORED_DTYPES[other]].itemsize))
    header, payload = {"__metadata__": header["__metadata__"]}, b""
    for key, (kind, shape, data) in parts.items():
        header[key] = {
            "dtype": kind, "shape": shape, "data_offsets": [len(payload), len(payload) + len(data)],
        }  # fmt: skip
        payload += data
    return Case({name: packed(header, payload)}, blamed, rng.choice(READERS))


def files(saved: Saved, rng: random.Random) -> Case:
    """A file that is none, or another one's."""
    name, own = rng.choice(list(saved.files)), saved.folder
    content = rng.choice(
        [
            None, b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, saved.files[name] + b"\0",
            Path("/dev/zero"), Path("/nowhere"), Path(name), Path("."), Path("/etc/passwd"),
            own / name, own / rng.choice(list(saved.files)),
        ]
    )  # fmt: skip
    added = {
        "evil.py": b"raise SystemExit('ran')",
        "pytorch_model.bin": b"cos\nsystem\n(S'true'\ntR.",
        "model-00009-of-00001.safetensors": b"",
    }
    return Case({name: content} | rng.choice([{}, added]))


def code(saved: Saved, rng: random.Random) -> Case:
    """Code of the folder's own, asked for in every field that has a name for it."""
    config = {**saved.config, "quantization_config": saved.manifest}
    names = {"AutoConfig": "evil.C", "AutoModel": "evil.M", "AutoModelForCausalLM": "evil.M"}
    for field in ("auto_map", "custom_pipelines", "trust_remote_code", "custom_generate"):
        if rng.random() < 0.5:
            config[field] = rng.choice([names, True, "evil.py", "evil--evil.C"])
    if rng.random() < 0.5:
        config[rng.choice(["model_type", "tokenizer_class"])] = rng.choice(["evil", "evil.C"])
    return Case({CONFIG: json.dumps(config).encode(), "evil.py": b"raise SystemExit('ran')"})


def raw_bytes(saved: Saved, rng: random.Random) -> Case:
    name = rng.choice(list(saved.files))
    data = bytearray(saved.files[name])
    del data[rng.choice([len(data), rng.randrange(len(data))]) :]
    for _ in range(rng.choice([1, 3, 30])):
        # most of what tells is in front
        at = rng.randrange(min(len(data), rng.choice([16, 4096, len(data)]))) if data else 0
        data[at : at + 1] = bytes([rng.randrange(256)])
    return Case({name: bytes(data)})


# How often each is drawn.
WAYS = {
    model_fields: 3, manifest_fields: 4, other_json: 1, index_outside: 1, header_fields: 4,
    values: 3, tensors: 3, files: 1, code: 1, raw_bytes: 2,
}  # fmt: skip


@contextlib.contextmanager
def laid(saved: Saved, folder: Path, case: Case) -> Iterator[None]:
    """The spoiled copy in `folder`, which holds links to the sound files before and after."""
    for name, content in case.files.items():
        (folder / name).unlink(missing_ok=True)
        if isinstance(content, Path):
            (folder / name).symlink_to(content)
        elif content is not None:
            (folder / name).write_bytes(content)
    try:
        yield
    finally:
        for name in case.files:
            (folder / name).unlink(missing_ok=True)
            if name in saved.files:
                os.link(saved.folder / name, folder / name)


class Watch:
    """Notices what loading must never do: write, unpickle, start a program, open a connection."""

    def __init__(self) -> None:
        self.on, self.seen = False, []
        sys.addaudithook(self._event)

    def _event(self, event: str, args: tuple) -> None:
        if not self.on:
            return
        writes = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        other = event in ("pickle.find_class", "subprocess.Popen", "os.system", "socket.connect")
        if writes or other:
            self.seen.append((event, *map(str, args)))

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        self.on, self.seen = True, []
        try:
            yield
        finally:
            self.on = False
        assert not self.seen, self.seen


def tried(folder: Path, case: Case, watch: Watch) -> bool:
    """Whether the copy was refused; AssertionError for one that was not as it must be."""
    try:
        with watch():
            model = case.read(folder)
    except CheckpointError as error:
        said = str(error)
        assert f"{folder}{os.sep}" in said, f"no file is named: {said}"
        assert case.blamed is None or f"tensor {case.blamed}" in said, (
            f"{case.blamed} is not named: {said}"
        )
        return True
    assert case.blamed is None, f"{case.blamed} is not refused"
    with torch.no_grad():
        logits = model(TOKENS).logits
    assert logits.shape[:2] == TOKENS.shape
    return False


def main(work: str, begin: str, end: str, *folders: str) -> None:
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable()
    watch, kinds, weights = Watch(), list(WAYS), list(WAYS.values())
    found: collections.Counter[str] = collections.Counter()
    all_saved = [Saved(Path(folder)) for folder in folders]
    copies = []
    for number, saved in enumerate(all_saved):
        copies.append(Path(work) / f"{begin}-{number}")
        copies[-1].mkdir()
        for name in saved.files:
            os.link(saved.folder / name, copies[-1] / name)
        for read in READERS:
            read(saved.folder)(TOKENS)  # whatever is imported late
    for number in range(int(begin), int(end)):
        rng = random.Random(number)
        saved, folder = all_saved[number % len(folders)], copies[number % len(folders)]
        (way,) = rng.choices(kinds, weights)
        print("case", number, way.__name__, flush=True)
        case = way(saved, rng)
        signal.alarm(HANGS)
        try:
            with laid(saved, folder, case), contextlib.redirect_stderr(io.StringIO()):
                end = "refused" if tried(folder, case, watch) else "worked"
        except Exception as error:
            end = "failed"
            print(f"failed: {number} {way.__name__}: {type(error).__name__}: {error}", flush=True)
        found[f"{way.__name__} {end}"] += 1
    signal.alarm(0)
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
