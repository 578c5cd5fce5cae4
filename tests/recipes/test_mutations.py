"""Damaged and lying model files: every one is opened, or refused in one line that leaves nothing.

More than 500 mutations in one process. A success is fine where a mutation did no harm; a traceback,
a file left behind, or memory out of all proportion is not.
"""

import copy
import json
import pathlib
import random
import resource
import shutil
import struct
from collections.abc import Callable, Iterator

import pytest
import tiny_models
from goldens import FOLDER

from jaxreason import convert

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
WEIRD = (
    None, True, -1, 0, 1, 3, 10**9, 10**30, -1.5, 0.1, 1e308, float("nan"), float("inf"), "", "x",
    "../../etc/passwd", [], [1], [[]], {}, {"a": 1}, ["a"] * 3, "a" * 5000,
)  # fmt: skip
CONFIGS = sorted(FOLDER.glob("hf/*/config.json"))
Mutation = tuple[str, Callable[[pathlib.Path], None]]


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> pathlib.Path:
    """A Hugging Face folder in two shards, and a GGUF file."""
    room = tmp_path_factory.mktemp("sound")
    tiny_models.write_folder(room / "hf", shard_bytes=90_000)
    assert all((room / "hf" / name).exists() for name in SHARDS)
    tiny_models.write_gguf(room / "model.gguf", "Q8_0")
    return room


def rewrite(name: str, change: Callable[[bytes], bytes]) -> Callable[[pathlib.Path], None]:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes())) and None


def cut(at: float) -> Callable[[bytes], bytes]:
    return lambda data: data[: int(at * len(data))]


def flip(seed: int, count: int, span: int | None = None) -> Callable[[bytes], bytes]:
    """Random bytes in the first `span` bytes."""

    def change(data: bytes) -> bytes:
        rng, out = random.Random(seed), bytearray(data)
        for _ in range(count):
            out[rng.randrange(min(len(out), span or len(out)))] = rng.randrange(256)
        return bytes(out)

    return change


def header(change: Callable[[dict], object]) -> Callable[[bytes], bytes]:
    """A safetensors file whose header says something else."""

    def rewritten(data: bytes) -> bytes:
        (size,) = struct.unpack("<Q", data[:8])
        content = json.loads(data[8 : 8 + size])
        new = change(content)
        text = json.dumps(content if new is None else new).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + size :]

    return rewritten


def of_safetensors(rng: random.Random) -> Iterator[Mutation]:
    for i in range(30):
        yield f"cut {i}", rewrite(rng.choice(SHARDS), cut(rng.random() ** 3))
    for i in range(50):
        yield f"flip in the header {i}", rewrite(SHARDS[0], flip(i, rng.choice((1, 4)), 1500))
    for size in (0, 1, 7, 2**31, 2**40, 2**63, 2**64 - 1):
        lie = struct.pack("<Q", size)
        yield f"header of {size}", rewrite(SHARDS[1], lambda data, lie=lie: lie + data[8:])
    for i in range(60):
        field = rng.choice(("dtype", "shape", "data_offsets"))
        value = rng.choice((*WEIRD, "F16", "I64", "F8_E4M3", [2**40, 2**40], [0, 10**12], [5, 4]))
        where = rng.random()

        def lie(content: dict, field=field, value=value, at=where) -> None:
            names = [name for name in content if name != "__metadata__"]
            content[names[int(at * len(names))]][field] = value

        yield f"{field} {str(value)[:20]} {i}", rewrite(rng.choice(SHARDS), header(lie))
    for i in range(15):
        where = rng.random()

        def lose(content: dict, at=where, other=i % 3) -> None:
            names = [name for name in content if name != "__metadata__"]
            entry = content.pop(names[int(at * len(names))])
            if other:
                content["another.weight" if other == 1 else "model.layers.99.x"] = entry

        yield f"tensor lost {i}", rewrite(SHARDS[i % 2], header(lose))
    for name in (*SHARDS, "model.safetensors.index.json", "config.json"):
        yield f"no {name}", lambda folder, name=name: (folder / name).unlink()
        yield f"empty {name}", rewrite(name, lambda _: b"")
        yield f"a folder {name}", lambda folder, name=name: [
            (folder / name).unlink(), (folder / name).mkdir()
        ] and None  # fmt: skip
    for i, value in enumerate((*WEIRD, "../x.safetensors", "/etc/passwd", "config.json")):
        text = json.dumps({"weight_map": {"lm_head.weight": value}}).encode()
        yield f"index {i}", rewrite("model.safetensors.index.json", lambda _, text=text: text)
    pickle = b"\x80\x02cos\nsystem\nq\x00X\x04\x00\x00\x00trueq\x01\x85q\x02Rq\x03."

    def only_bin(folder: pathlib.Path) -> None:
        for name in (*SHARDS, "model.safetensors.index.json"):
            (folder / name).unlink()
        (folder / "pytorch_model.bin").write_bytes(pickle)

    yield "a pickle", only_bin
    yield "a pickle in disguise", rewrite(SHARDS[0], lambda _: pickle)


def of_config(rng: random.Random, fields: list[str]) -> Iterator[Mutation]:
    def change(edit: Callable[[dict], object]) -> Callable[[pathlib.Path], None]:
        def rewritten(data: bytes) -> bytes:
            content = json.loads(data)
            edit(content)
            return json.dumps(content).encode()

        return rewrite("config.json", rewritten)

    for name in fields:
        yield f"no {name}", change(lambda c, name=name: c.pop(name))
        for value in (10**9, -1, rng.choice(WEIRD), rng.choice(WEIRD)):
            yield (
                f"{name} {str(value)[:20]}",
                change(lambda c, name=name, value=value: c.update({name: value})),
            )
    extra = {
        "rope_scaling": [{"type": "yarn", "factor": 4}, {"type": "linear"}, {"type": []}, "x",
                         {"rope_type": "llama3", "factor": 1e400}, {"full": {"rope_theta": 1}}],
        "rope_parameters": [{"rope_type": "longrope"}, [1], {"rope_theta": "many"}],
        "quantization_config": [{"bits": 4}], "sliding_window": [10**9], "layer_types": [["x"]],
        "model_type": ["mistral", "qwen2", "qwen3", "gpt_neox", "opt", "olmoe", "mamba", [], {}],
        "num_experts": [10**9], "eos_token_id": [-1, "x", [[]], 10**12], "auto_map": [{"a": "b"}],
    }  # fmt: skip
    for name, values in extra.items():
        for value in values:
            yield f"{name} {value}", change(lambda c, n=name, v=value: c.update({n: v}))
    for path in CONFIGS:
        yield (
            f"config of {path.parent.name}",
            rewrite("config.json", lambda _, p=path: p.read_bytes()),
        )
    for i, text in enumerate((b"[" * 10**5, b"{}", b"[]", b"1" * 10**5, b"\xff\xfe", b'{"a":')):
        yield f"text {i}", rewrite("config.json", lambda _, text=text: text)
    for i in range(15):
        yield f"flip {i}", rewrite("config.json", flip(i, 2))


def places(value, path=()) -> Iterator[tuple]:
    """Paths to the nodes of a JSON value."""
    yield path
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in list(items)[:12]:
            yield from places(inner, (*path, key))


def of_tokenizer(rng: random.Random) -> Iterator[Mutation]:
    content = json.loads(tiny_models.tokenizer())
    paths = [path for path in places(content) if path]
    for i in range(100):
        *way, last = rng.choice(paths)
        changed = copy.deepcopy(content)
        node = changed
        for key in way:
            node = node[key]
        value = rng.choice(WEIRD)
        if rng.random() < 0.2 and isinstance(node, dict):
            del node[last]
        else:
            node[last] = value
        text = json.dumps(changed).encode()
        yield (
            f"{'.'.join(map(str, [*way, last]))} {i}",
            rewrite("tokenizer.json", lambda _, t=text: t),
        )
    for i in range(20):
        yield f"cut {i}", rewrite("tokenizer.json", cut(rng.random()))
        yield f"flip {i}", rewrite("tokenizer.json", flip(i, 3))
    for name in ("tokenizer_config.json", "generation_config.json"):
        for i, value in enumerate(WEIRD):
            fields = {"eos_token": value, "eos_token_id": value, "chat_template": value}
            text = json.dumps(fields).encode()
            yield f"{name} {i}", rewrite(name, lambda _, t=text: t)
    yield "template of bytes", rewrite("chat_template.jinja", lambda _: b"\xff\xfe{{")
    yield (
        "a dangerous template",
        rewrite("chat_template.jinja", lambda _: b"{{ ''.__class__.__mro__[1].__subclasses__() }}"),
    )
    yield "no tokenizer", lambda folder: (folder / "tokenizer.json").unlink()


def of_gguf(rng: random.Random, size: int) -> Iterator[Mutation]:
    name = "model.gguf"
    for i in range(30):
        yield f"cut {i}", rewrite(name, cut(rng.random() ** 2))
    for i in range(110):
        yield f"flip {i}", rewrite(name, flip(i, rng.choice((1, 2, 8)), size))
    for at in (4, 8, 16, 24, 28):
        for value in (0, 1, 2**31, 2**63, 2**64 - 1):
            packed = struct.pack("<Q", value)
            yield (
                f"{value} at {at}",
                rewrite(name, lambda d, at=at, p=packed: d[:at] + p + d[at + 8 :]),
            )
    for key in (b"llama.block_count", b"llama.embedding_length", b"llama.attention.head_count"):
        for value in (0, 1, 10**9, 2**32 - 1):
            yield f"{key.decode()} {value}", rewrite(name, field(key, struct.pack("<I", value)))


def field(key: bytes, value: bytes) -> Callable[[bytes], bytes]:
    """A GGUF whose 32-bit field has another value."""

    def change(data: bytes) -> bytes:
        at = data.index(key) + len(key) + 4
        return data[:at] + value + data[at + len(value) :]

    return change


def attempt(source: pathlib.Path, to: pathlib.Path, capsys, name: str) -> bool:
    """Converts, and holds what must be true of every outcome; returns whether it succeeded."""
    code = convert.main([f"--from={source}", f"--to={to}", "--format=hf"])
    out, err = capsys.readouterr()
    assert code in (0, 2), f"{name}: exit code {code}\n{err}"
    assert "Traceback" not in out + err, f"{name}\n{err}"
    if code == 0:
        assert to.is_dir(), name
        shutil.rmtree(to)
    else:
        assert err.startswith("error: ") and err.count("\n") == 1 and len(err) < 700, (
            f"{name}\n{err}"
        )
    assert [path.name for path in to.parent.iterdir()] == [], name
    return code == 0


def run(mutations: Iterator[Mutation], sound: pathlib.Path, tmp_path, capsys, source) -> list[bool]:
    (tmp_path / "out").mkdir()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    results = []
    for name, mutate in mutations:
        room = tmp_path / "model"
        shutil.copytree(sound, room)
        mutate(room)
        results.append(attempt(room / source, tmp_path / "out/to", capsys, name))
        shutil.rmtree(room)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < 500, f"{grown:.0f} MB more than before"
    return results


def test_safetensors(sound, tmp_path, capsys):
    results = run(of_safetensors(random.Random(1)), sound / "hf", tmp_path, capsys, "")
    assert len(results) > 190 and results.count(False) > 150


def test_config(sound, tmp_path, capsys):
    fields = list(json.loads((sound / "hf/config.json").read_text()))
    results = run(of_config(random.Random(2), fields), sound / "hf", tmp_path, capsys, "")
    assert len(results) > 140 and results.count(False) > 90


def test_tokenizer(sound, tmp_path, capsys):
    results = run(of_tokenizer(random.Random(3)), sound / "hf", tmp_path, capsys, "")
    assert len(results) > 180 and results.count(False) > 90


def test_gguf(sound, tmp_path, capsys):
    data = (sound / "model.gguf").read_bytes()
    room = tmp_path / "gguf"
    room.mkdir()
    (room / "model.gguf").write_bytes(data)
    mutations = of_gguf(random.Random(4), data.index(b"blk.1"))
    results = run(mutations, room, tmp_path, capsys, "model.gguf")
    assert len(results) > 170 and results.count(False) > 90


def test_the_sound_ones_convert(sound, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    for source in (sound / "hf", sound / "model.gguf"):
        assert attempt(source, tmp_path / "out/to", capsys, str(source))
