"""What other people's keys may hold: every field with every kind of value ends in a sane model or in one line."""

import contextlib
import json
import math
import resource
import shutil
import signal
import struct
import sys
from pathlib import Path

import pytest
import torch
from fuzz_seeds import write_seeds
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from checkpoint import load_model, read_config
from errors import UserError, shown
from formats import gguf, gguf_tokenizer, meta
from formats.config import KEYS, NULLABLE, ROPE_TYPES
from formats.convert import convert
from formats.fields import either, flag, integer, list_of, mapping, number, read, text
from formats.gguf_file import read_gguf
from model import ModelConfig, rope_table

BASE = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 259,
    "max_position_embeddings": 256,
}
NUMBERS = [0, 1, 2, 3, 4, 7, -1, 0.5, 1.0, 1.5, 1e-6, 1e7, 1e18, 1e30, 2**31 - 1, 2**31, 2**63, 10**400]
NUMBERS += [math.nan, math.inf, -math.inf]
DEEP = json.loads("[" * 500 + "]" * 500)
VALUES = [
    None,
    True,
    False,
    *NUMBERS,
    "",
    "x",
    "1",
    "1" * 9999,
    [],
    [1],
    [1] * 2,
    [None],
    ["x"] * 2,
    {},
    {"a": 1},
    DEEP,
]
VALUES += [["full_attention"] * 2, ["sliding_attention"] * 2, [True, False], [1, 2]]
PER_PAIR = [1.0] * 8
EACH_IDEA = ("llama", "mistral", "phi3", "qwen2", "smollm3", "cwm", "granite", "exaone4", "olmo3", "gemma3_text")
NO_WINDOW = {"model_type": "ministral", "sliding_window": None}
ROPES = {
    "default": {},
    "linear": {"factor": 2.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "longrope": {"short_factor": PER_PAIR, "long_factor": PER_PAIR},
    "yarn": {"factor": 4.0},
}


def is_sane(config: ModelConfig) -> bool:
    """Whether a model can be built of it and computes numbers."""
    sizes = (config.dim, config.n_layer, config.n_head, config.n_local_heads, config.head_dim, config.block_size)
    assert all(type(size) is int and size > 0 for size in sizes)
    assert config.n_layer <= 10_000 and config.n_head <= 2**16 and config.block_size < 2**31
    assert 0 < config.rotary_dim <= config.head_dim and config.rotary_dim % 2 == 0
    assert 0 < config.norm_eps <= 1
    assert len(config.windows) in (0, config.n_layer) and len(config.rope_layers) in (0, config.n_layer)
    tables = [rope_table(config, length) for length in (3, 300)]
    return all(table.isfinite().all() and table.shape[1:] == (config.rotary_dim // 2, 2) for table in tables)


def one_line(error: UserError) -> bool:
    return 0 < len(str(error)) <= 500 and str(error).isprintable()


@contextlib.contextmanager
def bounded(seconds: int = 10, gigabytes: int = 2):
    """Ends what takes longer, or more memory on top of what there is."""

    def late(*_):
        raise TimeoutError

    before, limits = signal.signal(signal.SIGALRM, late), resource.getrlimit(resource.RLIMIT_DATA)
    if sys.platform == "linux":
        held = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_DATA, (held + gigabytes * 2**30, limits[1]))
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_DATA, limits)


# --- the reader -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "good", "bad"),
    [
        (
            integer(),
            [(1, 1), (32768.0, 32768), (2**31 - 1, 2**31 - 1)],
            [0, -1, 1.5, True, "1", 2**31, math.nan, 1e300],
        ),
        (number(0, 2), [(0, 0.0), (1.5, 1.5), (2, 2.0)], [-1e-9, 2.1, True, "1", math.nan, math.inf, 10**400, []]),
        (flag(), [(True, True), (False, False)], [0, 1, "true", []]),
        (text(("a", "b")), [("a", "a")], ["c", 1, ["a"], {}]),
        (mapping(), [({}, {}), ({"a": 1}, {"a": 1})], [[], 1, "x"]),
        (list_of(integer(), most=2), [([], ()), ([1, 2.0], (1, 2))], [[1, 2, 3], [0], "ab", {"a": 1}, ["1"]]),
        (either(integer(0, 1), flag()), [(1, 1), (True, True)], [2, "x", None]),
    ],
)
def test_fields_accept_what_they_say(field, good, bad):
    for value, expected in good:
        found = read("f", {"k": field}, {"k": value})["k"]
        assert found == expected and type(found) is type(expected)
    for value in bad:
        with pytest.raises(UserError, match=r"^f: k is ") as error:
            read("f", {"k": field}, {"k": value})
        assert one_line(error.value) and field.what in str(error.value)


def test_null_is_absent():
    assert read("f", {"k": integer(default=7)}, {"k": None}) == read("f", {"k": integer(default=7)}, {}) == {"k": 7}
    for values in ({}, {"k": None}):
        with pytest.raises(UserError, match=r"^f: k is missing; accepted: an integer from 1 to"):
            read("f", {"k": integer()}, values)


def test_values_are_shown_cut():
    for value in ("x" * 10**6, [["y" * 99] * 99] * 99, DEEP, 10**5000, {"a" * 500: {"b" * 500: 1}}):
        assert len(shown(value)) <= 100 and shown(value).isprintable()


# --- config.json ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", EACH_IDEA)
def test_every_key_with_every_value(family):
    """Ends in a sane model or in one line; and null is as good as absent, but for what it says there is none of."""
    accepted = 0
    for key in (*KEYS, "hidden_act", "model_type", "rope_scaling", "rope_parameters"):
        base = {**BASE, "model_type": family, "sliding_window": 8, "use_sliding_window": True}
        base.pop(key, None)
        outcomes = []
        for value in [None, *VALUES]:
            try:
                with bounded():
                    outcomes.append(ModelConfig.from_hf({**base, key: value} if outcomes else base))
                assert is_sane(outcomes[-1])
                accepted += 1
            except UserError as error:
                outcomes.append(str(error))
                assert one_line(error), (key, value)
        assert outcomes[0] == outcomes[1] or key in ("model_type", *NULLABLE)
    assert accepted > 100


@pytest.mark.parametrize("kind", ROPE_TYPES)
def test_every_rope_parameter_with_every_value(kind):
    values = [*VALUES, *([value] * 8 for value in VALUES)]
    for key in (*ROPE_TYPES[kind], "rope_theta", "partial_rotary_factor", "original_max_position_embeddings", "type"):
        for value in values:
            for where in ("rope_scaling", "rope_parameters"):
                try:
                    rope = {"rope_type": kind, **ROPES[kind], key: value}
                    assert is_sane(ModelConfig.from_hf({**BASE, where: rope})), (key, value)
                except UserError as error:
                    assert one_line(error), (key, value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_hidden_layers": 10**7}, r"num_hidden_layers is 10000000; accepted: an integer from 1 to 10000"),
        ({"num_attention_heads": 2**31}, r"num_attention_heads is 2147483648"),
        ({"num_attention_heads": 128}, r"hidden_size / num_attention_heads is 0"),
        ({"rms_norm_eps": math.nan}, r"rms_norm_eps is nan"),
        ({"rope_theta": -8}, r"rope_theta is -8"),
        ({"model_type": "phi3", "partial_rotary_factor": 1.5}, r"partial_rotary_factor is 1\.5"),
        ({"model_type": "phi3", "partial_rotary_factor": 0.2}, r"3 of 16 features of a head rotate; an even number"),
        ({"model_type": "phi3", "partial_rotary_factor": 0}, r"0 of 16 features of a head rotate"),
        ({"tie_word_embeddings": "false"}, r"tie_word_embeddings is 'false'; accepted: true or false"),
        (
            {**NO_WINDOW, "layer_types": ["chunked_attention"] * 2},
            r"layer_types is \['chunked_attention'",
        ),
        ({**NO_WINDOW, "layer_types": ["full_attention"]}, r"layer_types are told of 1 layers of 2"),
        (
            {**NO_WINDOW, "layer_types": ["sliding_attention"] * 2},
            r"has sliding_attention, but sliding_window is mis",
        ),
        ({"model_type": "smollm3", "no_rope_layers": [1]}, r"no_rope_layers are told of 1 layers of 2"),
        ({"rope_scaling": {"factor": 8.0}}, r"rope_scaling has a factor, but no rope_type"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, r"factor is 0\.5"),
        (
            {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.0] * 7}},
            r"long_factor has 7 numbers; 8 are needed",
        ),
        (
            {"rope_scaling": {**ROPES["llama3"], "rope_type": "llama3", "high_freq_factor": 1}},
            r"low_freq_factor 1 must be less than high_freq_factor 1",
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}},
            r"rope_parameters differ between \['full_attention', 'sliding_attention'\]",
        ),
    ],
)
def test_configs_that_cannot_be(change, words):
    with pytest.raises(UserError, match=f"^config.json: .*{words}"):
        ModelConfig.from_hf({**BASE, **change})


def test_configs_of_real_models_are_read():
    more = {"rope_theta": 1000000, "rms_norm_eps": 1e-06, "sliding_window": None, "eos_token_id": [1, 2], "new": [{}]}
    config = ModelConfig.from_hf({**BASE, **more, "max_position_embeddings": 10485760.0, "hidden_act": None})
    assert (config.block_size, config.rope_base, config.norm_eps, config.windows) == (10485760, 1e6, 1e-6, ())
    alike = {"full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 2}}
    config = ModelConfig.from_hf({**BASE, "rope_parameters": alike})
    assert (config.rope_base, config.rope_scaling["rope_type"], config.rope_scaling["factor"]) == (1e6, "linear", 2)
    both = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}  # and what Qwen says to add
    both["rope_scaling"] = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
    assert ModelConfig.from_hf({**BASE, **both}).rope_scaling["rope_type"] == "yarn"


@pytest.mark.parametrize("interval", [{}, {"no_rope_layer_interval": None}, {"no_rope_layer_interval": 4}])
@pytest.mark.parametrize("listed", [{}, {"no_rope_layers": None}])
def test_smollm3_skips_rope_by_interval(listed, interval):
    config = {**BASE, "model_type": "smollm3", "num_hidden_layers": 6, **listed, **interval}
    assert ModelConfig.from_hf(config).rope_layers == (True, True, True, False, True, True)
    assert ModelConfig.from_hf({**config, "no_rope_layer_interval": 2}).rope_layers == (True, False) * 3
    assert ModelConfig.from_hf({**config, "no_rope_layers": [0, 1] * 3}).rope_layers == (False, True) * 3
    assert ModelConfig.from_hf({**config, "model_type": "llama"}).rope_layers == ()


@pytest.mark.parametrize(
    ("context", "scaling", "expected"),
    [
        (32768, {"factor": 4.0, "original_max_position_embeddings": 32768}, 131072),  # as Qwen documents it
        (131072, {"factor": 4.0, "original_max_position_embeddings": 32768}, 131072),  # told after stretching
        (163840, {"factor": 40, "original_max_position_embeddings": 4096}, 163840),  # DeepSeek's
        (65536, {"factor": 2.0, "original_max_position_embeddings": 4096}, 65536),  # never less
        (4096, {"factor": 1.5, "original_max_position_embeddings": 4096}, 6144),
    ],
)
def test_yarn_extends_the_context(context, scaling, expected):
    rope = {"rope_type": "yarn", **scaling}
    assert (
        ModelConfig.from_hf({**BASE, "max_position_embeddings": context, "rope_scaling": rope}).block_size == expected
    )
    linear = {**rope, "rope_type": "linear"}
    config = ModelConfig.from_hf({**BASE, "max_position_embeddings": context, "rope_scaling": linear})
    assert config.block_size == context


# --- through the converter and the loader -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    """A small model in every format, a folder each."""
    write_seeds(folder := tmp_path_factory.mktemp("seeds"))
    for path in folder.glob("hf/model*.pth"):
        path.unlink()
    return folder


@torch.inference_mode()
def answers(folder: Path) -> bool:
    """Whether the model in it converts, loads and gives numbers; False where it is refused in one line."""
    try:
        with bounded():
            path = convert(folder, torch.float32)
            assert is_sane(read_config(folder))
            model = load_model(path, dtype=torch.float32)
            assert model(torch.tensor([[1, 2, 3]]), torch.tensor([0]), model.cache(1, 8)).isfinite().all()
    except UserError as error:
        assert one_line(error)
        assert not list(folder.glob("*model.pth*"))
        return False
    return True


@pytest.fixture
def copied(seeds, tmp_path):
    """A fresh copy of the folder of a format, time and again."""

    def copy(name: str) -> Path:
        shutil.rmtree(tmp_path / name, ignore_errors=True)
        return shutil.copytree(seeds / name, tmp_path / name)

    return copy


def gguf_value(value: object) -> bytes:
    """A metadata value with its type before it."""
    if isinstance(value, list):
        kind = gguf_value(value[0] if value else 0)[:4]
        assert all(gguf_value(each)[:4] == kind for each in value)
        return struct.pack("<I", 9) + kind + struct.pack("<Q", len(value)) + b"".join(gguf_value(v)[4:] for v in value)
    if isinstance(value, str):
        return struct.pack("<IQ", 8, len(value.encode())) + value.encode()
    kind, code = (10, "Q") if value == 2**63 else {bool: (7, "?"), int: (11, "q"), float: (12, "d")}[type(value)]
    return struct.pack(f"<I{code}", kind, value)


def change_gguf(path: Path, changes: dict) -> None:
    """Give a GGUF file's metadata other values; None leaves one out."""
    file = read_gguf(path)
    metadata = {key: value for key, value in (file.metadata | changes).items() if value is not None}
    header, data = b"", b""
    for name, tensor in file.tensors.items():
        shape = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape[::-1])
        header += gguf_value(name)[4:] + shape + struct.pack("<IQ", tensor.kind, len(data))
        data += bytes(tensor.data) + bytes(-len(tensor.data) % 32)
    values = b"".join(gguf_value(key)[4:] + gguf_value(value) for key, value in metadata.items())
    start = b"GGUF" + struct.pack("<IQQ", 3, len(file.tensors), len(metadata)) + values + header
    path.write_bytes(start + bytes(-len(start) % 32) + data)


TIMES = settings(
    max_examples=75, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
CONFIG_CHANGES = st.dictionaries(
    st.sampled_from([*KEYS, "rope_type", "factor", "hidden_act"]), st.sampled_from(VALUES), min_size=1, max_size=2
)
GGUF_KEYS = [f"llama.{key}" for key in (*gguf.TERMS, *gguf.SCALING, "rope.dimension_count", "rope.scaling.factor")]
GGUF_KEYS += [f"tokenizer.ggml.{key}" for key in gguf_tokenizer.KEYS]
GGUF_KEYS += ["general.architecture", "general.alignment", "tokenizer.chat_template", *gguf.SPLIT]
GGUF_VALUES = [None, True, False, 0, 1, 2, 3, 7, 96, 2**31, 2**63, -1, 0.5, 1e-6, 1e30, math.nan, math.inf, "", "x"]
GGUF_VALUES += ["yarn", "linear", "x" * 9999, [], [1], ["x"], [1.0] * 259, ["x"] * 259, [[1]], [[[[[1]]]]], [True]]


@TIMES
@given(CONFIG_CHANGES, st.sampled_from(list(ROPE_TYPES)))
def test_config_json_through_converter_and_loader(copied, changes, kind):
    folder = copied("hf")
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": kind, **ROPES[kind]}
    for key, value in changes.items():
        (config if key in KEYS else config["rope_parameters"])[key] = value
    (folder / "config.json").write_text(json.dumps(config))
    answers(folder)


@TIMES
@given(st.dictionaries(st.sampled_from(GGUF_KEYS), st.sampled_from(GGUF_VALUES), min_size=1, max_size=2))
def test_gguf_through_converter_and_loader(copied, changes):
    folder = copied("gguf")
    change_gguf(folder / "m.gguf", changes)
    answers(folder)


@TIMES
@given(st.sampled_from(["meta", "llama2c"]), st.sampled_from(list(meta.PARAMS)), st.sampled_from(VALUES))
def test_meta_parameters_through_converter_and_loader(copied, name, key, value):
    folder = copied(name)
    if name == "meta":
        path = folder / "params.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    else:
        state = torch.load(path := folder / "stories1M.pt", weights_only=True)
        torch.save({**state, "model_args": {**state["model_args"], key: value}}, path)
    answers(folder)


@pytest.mark.parametrize("name", ["hf", "bin", "sharded", "meta", "llama2c", "gguf"])
def test_seeds_are_answered(copied, name):
    folder = copied(name)
    if name == "gguf":
        change_gguf(folder / "m.gguf", {"general.author": "me"})
    assert answers(folder)


def test_more_layers_than_tensors(copied):
    for name, path, change in (
        ("hf", "config.json", {"num_hidden_layers": 9999}),
        ("meta", "params.json", {"n_layers": 9999}),
        ("gguf", "m.gguf", {"llama.block_count": 9999}),
    ):
        path = copied(name) / path
        if path.suffix == ".gguf":
            change_gguf(path, change)
        else:
            path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
        with bounded(2), pytest.raises(UserError, match=f"{path.name} has 9999 layers; there are tensors of 2"):
            convert(path.parent)
