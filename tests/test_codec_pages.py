"""Pages of codecs: their size in bytes, their codes, and attention over them."""

import math
from dataclasses import replace

import pytest
import torch
from harness import step_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nanokv.codecs import _QUANTIZERS, NAMES, kivi, pages, resolve_codec
from nanokv.codecs.pages import Heads
from nanokv.codecs.quantizer import TableQuantizer
from nanokv.core.errors import ConfigError
from nanokv.core.spec import LayerSpec, PageLayout
from nanokv.kernels import reference
from nanokv.kernels.ops import AUTO, Ops
from nanokv.kernels.planes import HeadNorms
from nanokv.layers.rotary import RopeConfig, cos_sin_table

PER_TOKEN = {  # bytes of a token and KV head, keys and values, at 64 and at 128 numbers
    "raw": (256, 512), "fp8": (132, 260), "int8": (132, 260), "fp8/tq4": (100, 196), "fp8/tq3": (92, 180),
    "fp8/tq2": (84, 164), "tq4": (68, 132), "rot4": (68, 132), "int4": (68, 132), "tq4/tq3": (60, 116),
    "tq4/tq2": (52, 100), "tq3": (52, 100), "tq3/tq2": (44, 84), "tq2": (36, 68), "tqp4": (70, 134),
    "tqp3": (54, 102), "tqp2": (38, 70), "tqp4-orth": (70, 134), "polar": (62, 124), "qjl": (52, 100),
    "kivi4": (80, 160), "kivi2": (48, 96), "raw/tq4": (162, 322),
}  # fmt: skip


@pytest.mark.parametrize("name", PER_TOKEN)
def test_a_token_takes_the_bytes_of_the_table_and_no_padding(name):
    codec = resolve_codec(name, torch.bfloat16)
    for dim, expected in zip((64, 128), PER_TOKEN[name], strict=True):
        spec = codec.spec(3, dim, 32)
        assert spec.bytes_per_token == 3 * expected
        layout = PageLayout([spec] * 2, 32)
        assert layout.page_bytes == layout.page_payload == 2 * 32 * 3 * expected


def test_groups_of_64_halve_the_metadata_of_kivi():
    assert resolve_codec("kivi4", torch.bfloat16).spec(1, 128, 64).bytes_per_token == 144
    assert resolve_codec("kivi2", torch.bfloat16).spec(1, 128, 64).bytes_per_token == 80


def test_unquantized_layers_are_counted_among_the_layers_with_attention():
    attention = [3, 7, 11, 15]
    codec = resolve_codec("tq4", torch.float32, native_layers="first1,last2", layers=attention)
    assert [codec.at(layer).name for layer in attention] == ["raw", "tq4", "raw", "raw"]
    assert resolve_codec("raw", torch.float32, native_layers="first1", layers=attention).name == "raw"


def test_every_listed_name_resolves_to_a_codec():
    for name in NAMES:
        assert resolve_codec(name, torch.float16).name == name
    with pytest.raises(ConfigError, match="or two of them as K/V"):
        resolve_codec("kivi2/tq4", torch.float32)


# ---- one layer ----------------------------------------------------------------------------------------------------


class Layer:
    """One attention layer's pages in a dirty pool, with rotations by an angle of 0."""

    def __init__(self, name: str, heads: int = 6, kv_heads: int = 3, dim: int = 64, page_size: int = 32, **choice):
        codec = resolve_codec(name, torch.float32, **choice)
        self.layout = PageLayout([LayerSpec(), codec.spec(kv_heads, dim, page_size)], page_size)
        cos_sin = cos_sin_table(RopeConfig(dim, 1e4), 512, torch.device("cpu"))
        cos_sin[:, : dim // 2], cos_sin[:, dim // 2 :] = 1, 0
        self.heads = Heads(heads, kv_heads, dim, 1 / math.sqrt(dim), cos_sin)
        self.pages = codec.pages(self.layout, 1, self.heads)
        self.pool = torch.full((24, self.layout.page_bytes), 0x3F, dtype=torch.uint8)
        self.states = torch.full((4, self.layout.state_bytes), 0x3F, dtype=torch.uint8)
        self.page_size = page_size

    def attend(self, qkv: torch.Tensor, rows: dict[int, range], tables: torch.Tensor) -> torch.Tensor:
        """Attends with qkv [rows, all heads * dim] of requests at the positions `rows`; `tables` holds their pages."""
        positions = torch.tensor([p for own in rows.values() for p in own])
        owners = torch.tensor([r for r, own in rows.items() for _ in own])
        batch = step_of(
            {r: list(own) for r, own in rows.items()}, tables, self.page_size,
            tables[owners, positions // self.page_size], positions % self.page_size,
        )  # fmt: skip
        states = torch.tensor(list(rows), dtype=torch.int32)
        return self.pages.attend(qkv.clone(), self.pool, self.states, replace(batch, state_ids=states))


def heads_of(rows: int, heads: int = 6, kv_heads: int = 3, dim: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, (heads + 2 * kv_heads) * dim, generator=torch.Generator().manual_seed(seed))


TABLES = torch.tensor([[7, 2, 19, 4], [1, 23, 5, 9]], dtype=torch.int32)


@pytest.mark.parametrize("name", ["tq3", "tqp4", "polar", "qjl", "raw/int8", "fp8", "kivi4"])
def test_appending_tokens_one_by_one_writes_the_bytes_of_one_step(name):
    qkv = heads_of(70)
    whole, parts = Layer(name), Layer(name)
    at_once = whole.attend(qkv, {0: range(70)}, TABLES)
    one_by_one = torch.cat([parts.attend(qkv[i : i + 1], {0: range(i, i + 1)}, TABLES) for i in range(70)])
    assert torch.equal(at_once, one_by_one)
    assert torch.equal(whole.pool, parts.pool)
    if name == "kivi4":
        tails = [layer.states[0].view(torch.float32).view(2, 3, 32, 64)[:, :, : 70 % 32] for layer in (whole, parts)]
        assert torch.equal(*tails)


@pytest.mark.parametrize("name", ["tq4", "tqp3", "raw/tq2", "kivi2"])
def test_page_ids_and_batch_mates_change_no_row(name):
    first, second = heads_of(45, seed=1), heads_of(67, seed=2)
    alone = [Layer(name).attend(qkv, {i: range(len(qkv))}, TABLES) for i, qkv in enumerate((first, second))]
    together = Layer(name).attend(torch.cat((first, second)), {0: range(45), 1: range(67)}, TABLES)
    assert torch.equal(together, torch.cat(alone))
    moved = Layer(name).attend(first, {0: range(45)}, torch.tensor([[21, 0, 3, 6]], dtype=torch.int32))
    assert torch.equal(moved, alone[0])


@pytest.mark.parametrize("name", [*_QUANTIZERS, "kivi2", "kivi4"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (8, 2), (7, 1), (8, 1)])
def test_attention_over_pages_equals_attention_over_decoded_vectors(name, heads, kv_heads):
    """Groups of 1, 4, 7 and 8 queries; the last row of a page, the first of the next, and one in between."""
    rows, dim = 65, 64
    layer = Layer(name, heads, kv_heads, exact=True)
    qkv = heads_of(rows, heads, kv_heads)
    found = layer.attend(qkv, {0: range(rows)}, TABLES).view(rows, heads, dim)
    q, k, v = qkv.view(rows, -1, dim).split((heads, kv_heads, kv_heads), dim=1)
    for row in (0, 31, 32, 40, 63, 64):
        keys, values = decoded(name, k[: row + 1], v[: row + 1])
        group = heads // kv_heads
        scores = torch.einsum("hd,thd->ht", q[row], keys.repeat_interleave(group, 1)) / math.sqrt(dim)
        expected = torch.einsum("ht,thd->hd", scores.softmax(-1), values.repeat_interleave(group, 1))
        assert torch.allclose(found[row], expected, atol=3e-4)


def decoded(name: str, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense K and V [tokens, heads, dim] as the query of the last token sees them, without pages and kernels."""
    if name.startswith("kivi"):
        full = (len(k) - 1) // 32 * 32
        bits = int(name[-1])
        parts = []
        for x, axis in ((k, 1), (v, 3)):
            groups = (
                x[:full].unflatten(0, (-1, 32)).unflatten(-1, (-1, 32))
                if axis == 3
                else x[:full].unflatten(0, (-1, 32))
            )
            axis = -1 if axis == 3 else 1
            low, high = groups.amin(axis, keepdim=True), groups.amax(axis, keepdim=True)
            step, low = ((high - low) / (2**bits - 1)).half().float(), low.half().float()
            codes = ((groups - low) / step).round().clamp(0, 2**bits - 1)
            parts.append(torch.cat(((codes * step + low).reshape(full, *x.shape[1:]), x[full:])))
        return parts[0], parts[1]
    codec = resolve_codec(name, torch.float32)
    encoders = [one.encoder(64, torch.device("cpu")) for one in (codec.k, codec.v)]
    return tuple(
        s if encoder.basis is None else encoder.basis.back(s)
        for encoder, x in zip(encoders, (k, v), strict=True)
        for s in [encoder.decode(*encoder.encode(x.contiguous()))]
    )


def test_rope_alone_gives_the_bits_of_rope_and_store_and_writes_no_page():
    layer, raw = Layer("tq4"), Layer("raw")
    positions = torch.arange(40)
    batch = step_of({0: list(range(40))}, TABLES, 32, TABLES[0, positions // 32], positions % 32)
    angles = torch.randn(40, 32, generator=torch.Generator().manual_seed(2))
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=1)
    norms = HeadNorms(torch.full((64,), 1.5), torch.full((64,), 0.5), 1e-6)
    alone, stored, reference_alone = (heads_of(40) for _ in range(3))
    AUTO.rope(alone, cos_sin, batch, 6, 3, 64, norms)
    AUTO.rope_and_store(stored, cos_sin, raw.pool, raw.pages.planes, batch, 6, norms)
    reference.rope(reference_alone, cos_sin, batch, 6, 3, 64, norms)
    assert torch.equal(alone, stored) and torch.allclose(alone, reference_alone, atol=1e-5)
    assert (layer.pool == 0x3F).all()  # no page was written


# ---- quality of attention -----------------------------------------------------------------------------------------


def keys_of(kind: str) -> torch.Tensor:
    k = torch.randn(512, 1, 64, generator=torch.Generator().manual_seed(11))
    if kind == "outliers":
        k[..., torch.randperm(64, generator=torch.Generator().manual_seed(3))[:4]] *= 8
    elif kind == "biased":
        k[..., :4] += 25 * torch.tensor([1.0, -1.0, 1.0, -1.0])
    return k


def loss(name: str, k: torch.Tensor, is_centered: bool = False) -> float:
    """Divergence of the attention weights of 64 queries over coded keys from those over the keys themselves."""
    q = torch.randn(64, 64, generator=torch.Generator().manual_seed(12))
    encoder = _QUANTIZERS[name].encoder(64, torch.device("cpu"))
    coded = k - k.mean(0) if is_centered else k
    s = encoder.decode(*encoder.encode(coded))
    turned = q if encoder.basis is None else encoder.basis.to(q)
    truth = (q @ k[:, 0].T / 8).log_softmax(-1)
    return (truth.exp() * (truth - (turned @ s[:, 0].T / 8).log_softmax(-1))).sum(-1).mean().item()


@pytest.mark.parametrize("kind", ["normal", "outliers", "biased"])
def test_more_bits_lower_the_loss_and_a_sketch_of_the_residual_raises_it(kind):
    k = keys_of(kind)
    losses = [loss(name, k) for name in ("fp8", "tq4", "tq3", "tq2")]
    assert losses == sorted(losses)
    for bits in (3, 4):
        assert loss(f"tq{bits}", k) < loss(f"tqp{bits}-orth", k) < loss(f"tqp{bits}", k)


def test_rotation_helps_keys_with_large_channels_and_centering_biased_keys():
    outliers, biased = keys_of("outliers"), keys_of("biased")
    assert loss("tq4", outliers) < loss("int4", outliers) / 3
    assert loss("rot4", outliers) < loss("int4", outliers) / 3
    assert loss("tq4", biased, is_centered=True) < loss("tq4", biased) / 5
    assert loss("tq4", biased, is_centered=True) == pytest.approx(loss("tq4", keys_of("normal")), rel=0.5)


@pytest.mark.parametrize("name", ["tq4", "qjl", "raw/int8", "kivi4"])
def test_the_range_of_keys_is_checked_after_their_mean_is_subtracted(name):
    layer = Layer(name)
    layer.pages.key_mean.mean = torch.full((3, 64), -4e4)
    qkv = heads_of(4)
    qkv[1, 6 * 64] = 6e4  # fits in float16, but minus the mean it is 1e5
    qkv[2, 6 * 64] = -1e5  # fits only minus the mean
    batch = replace(step_of({0: [0, 1, 2, 3]}, TABLES, 32, TABLES[0, torch.zeros(4).long()], torch.arange(4)),
                    state_ids=torch.zeros(1).int())  # fmt: skip
    found = layer.pages.attend(qkv, layer.pool, layer.states, batch)
    assert batch.unwritable.tolist() == [False, True, False, False]
    assert found.isfinite().all()


@pytest.mark.parametrize("name", ["tq4", "fp8", "tqp3", "raw/tq4", "kivi4"])
def test_a_gpu_attends_in_the_dtype_of_the_model(name, monkeypatch):
    """Simulated on a CPU: the kernels receive bfloat16 queries and pages decoded to bfloat16."""
    seen, qkv = [], heads_of(40)
    expected = Layer(name).attend(qkv, {0: range(40)}, TABLES)
    for module in (pages, kivi):
        monkeypatch.setattr(module, "attention_dtype", lambda _: torch.bfloat16)
    for op in ("paged_attention", "code_attention", "group_attention"):
        own = getattr(Ops, op)
        monkeypatch.setattr(Ops, op, lambda self, q, *rest, own=own: seen.append((q, rest[1])) or own(self, q, *rest))
    found = Layer(name).attend(qkv, {0: range(40)}, TABLES)
    ((q, planes),) = seen
    assert q.dtype == torch.bfloat16 and getattr(planes, "dtype", torch.bfloat16) == torch.bfloat16
    assert found.dtype == torch.float32 and 0 < (found - expected).norm() < 0.01 * expected.norm()


class SizesFromNumbers(TorchDispatchMode):
    """Records operations whose result size depends on data, or that copy a number to the host: both would synchronise
    with a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_number = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags)
        if name.strip("_").startswith("index"):  # by ids or, with a size that depends on data, by a mask
            by_number = any(isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in tree_leaves(args[1:2]))
        if by_number:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("name", [*NAMES, "fp8/tq4", "raw/tq4"])
def test_a_decode_step_is_recordable_if_no_size_depends_on_data(name, exact):
    layer = Layer(name, exact=exact)
    layer.attend(heads_of(37), {0: range(32), 1: range(5)}, TABLES)
    layer.attend(heads_of(2), {0: range(32, 33), 1: range(5, 6)}, TABLES)  # as before a capture: creates constants
    with SizesFromNumbers() as sizes:
        layer.attend(heads_of(2), {0: range(33, 34), 1: range(6, 7)}, TABLES)
    assert layer.pages.is_recordable == (not sizes.seen), sizes.seen
    has_kernels = all(side == "raw" or isinstance(_QUANTIZERS.get(side), TableQuantizer) for side in name.split("/"))
    assert layer.pages.is_recordable == (has_kernels and name != "raw/tq4")
