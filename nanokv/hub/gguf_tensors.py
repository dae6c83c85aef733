"""The tensors of a checkpoint and the tensors of a GGUF file that each is made of.

GGUF keeps the numbers of a checkpoint under other names, and changes four things, which are undone here: the order of
rows in q and k of the architecture llama (llama.cpp rotates neighbours, checkpoints rotate halves), experts stacked in
one tensor, DeepSeek's kv_b_proj in two parts of which one is transposed, and quantised blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from nanokv.core.errors import PullError
from nanokv.hub.gguf_file import GGUFFile
from nanokv.hub.gguf_header import shown

Shape = tuple[int, ...]


def undo_permutation(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Reorders the rows of a q or k projection, or its bias, from llama.cpp's pairs of neighbours to halves.

    weight    [num_heads * head_dim, ...]
    Returns   the same shape
    Source    the inverse of LlamaModel.permute in llama.cpp's convert_hf_to_gguf.py
    """
    rows, *rest = weight.shape
    return weight.reshape(num_heads, rows // num_heads // 2, 2, *rest).swapaxes(1, 2).reshape(weight.shape)


@dataclass(frozen=True)
class Tensor:
    """One tensor of the checkpoint.

    name     in the checkpoint
    shape    in the checkpoint
    source   its name in the GGUF file
    heads    of which it holds the rows in llama.cpp's order; 0: the order is the same
    expert   its place in a stacked tensor; None: it is not stacked
    values   of kv_b_proj: the GGUF tensor with its rows of v, beside the transposed ones of k in `source`
    exact    keep it in float32
    """

    name: str
    shape: Shape
    source: str
    heads: int = 0
    expert: int | None = None
    values: str = ""
    exact: bool = False

    def read(self, file: GGUFFile) -> Iterator[np.ndarray]:
        """Its numbers in float32, a few million at once, in the order of the checkpoint."""
        if self.values:
            keys, values = file.tensor(self.source), file.tensor(self.values)
            yield np.concatenate([keys.swapaxes(1, 2), values], axis=1).reshape(-1)
            return
        yield from file.decode(self.source, self._rows(file))

    def blocks(self, file: GGUFFile) -> np.ndarray | None:
        """A matrix in blocks Q8_0, uint8 [out, in / 32, 34], in the order of the checkpoint; None for other tensors.

        A block is a float16 scale, then 32 codes int8.
        """
        if self.values or self.exact or len(self.shape) != 2 or not file.is_q8(self.source):
            return None
        return self._rows(file).reshape(self.shape[0], -1, 34)

    def _rows(self, file: GGUFFile) -> np.ndarray:
        """The stored bytes of each row, in the order of the checkpoint."""
        rows = file.rows(self.source)
        if self.expert is not None:
            rows = rows[self.expert]
        return undo_permutation(rows, self.heads) if self.heads else rows


class _Table:
    """The tensors of one model, and the shapes that their sources must have.

    Experts are listed one by one only once the shape of their stack is known to be right (`all`).
    """

    def __init__(self, config: dict) -> None:
        self.config = config
        self.tensors: list[Tensor] = []
        self.sources: dict[str, Shape] = {}
        self.num_experts: int = config.get("n_routed_experts") or config.get("num_experts") or 0
        self._stacks: list[tuple[str, Shape, str]] = []

    def add(self, name: str, source: str, *shape: int, heads: int = 0, exact: bool = False) -> None:
        """A tensor of the same shape in both."""
        self.sources[source] = shape
        self.tensors.append(Tensor(name, shape, source, heads, exact=exact))

    def add_stack(self, name: str, source: str, *shape: int) -> None:
        """A tensor for each expert; `name` has a place for its number."""
        self.sources[source] = (self.num_experts, *shape)
        self._stacks.append((name, shape, source))

    def all(self) -> list[Tensor]:
        """All tensors."""
        stacked = [
            Tensor(name.format(e), shape, source, expert=e)
            for name, shape, source in self._stacks
            for e in range(self.num_experts)
        ]
        return self.tensors + stacked


def tensors(file: GGUFFile, config: dict) -> list[Tensor]:
    """The tensors of the checkpoint with `config`, each of which can be read from `file`.

    Raises PullError naming tensors of the file that are missing, unknown or of the wrong shape.
    """
    table = _Table(config)
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    table.add("model.embed_tokens.weight", "token_embd.weight", vocab, hidden)
    table.add("model.norm.weight", "output_norm.weight", hidden)
    if not config["tie_word_embeddings"]:
        table.add("lm_head.weight", "output.weight", vocab, hidden)
    latent = config.get("kv_lora_rank") is not None
    halves = file.text("general.architecture") == "llama"
    for i in range(config["num_hidden_layers"]):
        layer, block = f"model.layers.{i}.", f"blk.{i}."
        table.add(f"{layer}input_layernorm.weight", f"{block}attn_norm.weight", hidden)
        table.add(f"{layer}post_attention_layernorm.weight", f"{block}ffn_norm.weight", hidden)
        if latent:
            _latent_attention(table, file, f"{layer}self_attn.", block)
        else:
            _attention(table, f"{layer}self_attn.", block, halves)
        if "moe_intermediate_size" in config and i >= config.get("first_k_dense_replace", 0):
            _experts(table, f"{layer}mlp.", block)
        else:
            _feed_forward(table, f"{layer}mlp.", block, "", config["intermediate_size"])
    _compare(file, table.sources, {"rope_freqs.weight"} if halves else set())
    return table.all()


def _attention(table: _Table, layer: str, block: str, halves: bool) -> None:
    """Grouped-query attention. `halves`: rows of q and k are in llama.cpp's order."""
    config = table.config
    hidden, dim, family = config["hidden_size"], config["head_dim"], config["model_type"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    for part, count, turns in (("q", heads, halves), ("k", kv_heads, halves), ("v", kv_heads, False)):
        permuted, rows = (count if turns else 0), count * dim
        table.add(f"{layer}{part}_proj.weight", f"{block}attn_{part}.weight", rows, hidden, heads=permuted)
        if family == "qwen2" or config.get("attention_bias"):
            table.add(f"{layer}{part}_proj.bias", f"{block}attn_{part}.bias", rows, heads=permuted)
    table.add(f"{layer}o_proj.weight", f"{block}attn_output.weight", hidden, heads * dim)
    if config.get("attention_bias"):
        table.add(f"{layer}o_proj.bias", f"{block}attn_output.bias", hidden)
    if family.startswith("qwen3"):
        table.add(f"{layer}q_norm.weight", f"{block}attn_q_norm.weight", dim)
        table.add(f"{layer}k_norm.weight", f"{block}attn_k_norm.weight", dim)


def _latent_attention(table: _Table, file: GGUFFile, layer: str, block: str) -> None:
    """Multi-head latent attention, whose rotated rows llama.cpp leaves in the checkpoint's order."""
    config = table.config
    hidden, heads, rank = config["hidden_size"], config["num_attention_heads"], config["kv_lora_rank"]
    nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    q_width, q_rank = heads * (nope + rope), config["q_lora_rank"]
    if q_rank is None:
        table.add(f"{layer}q_proj.weight", f"{block}attn_q.weight", q_width, hidden)
    else:
        table.add(f"{layer}q_a_proj.weight", f"{block}attn_q_a.weight", q_rank, hidden)
        table.add(f"{layer}q_a_layernorm.weight", f"{block}attn_q_a_norm.weight", q_rank)
        table.add(f"{layer}q_b_proj.weight", f"{block}attn_q_b.weight", q_width, q_rank)
    table.add(f"{layer}kv_a_proj_with_mqa.weight", f"{block}attn_kv_a_mqa.weight", rank + rope, hidden)
    table.add(f"{layer}kv_a_layernorm.weight", f"{block}attn_kv_a_norm.weight", rank)
    shape, whole = (heads * (nope + value), rank), f"{block}attn_kv_b.weight"
    if whole in file.tensor_names:
        table.add(f"{layer}kv_b_proj.weight", whole, *shape)
    else:
        keys, values = f"{block}attn_k_b.weight", f"{block}attn_v_b.weight"
        table.sources |= {keys: (heads, rank, nope), values: (heads, value, rank)}
        table.tensors.append(Tensor(f"{layer}kv_b_proj.weight", shape, keys, values=values))
    table.add(f"{layer}o_proj.weight", f"{block}attn_output.weight", hidden, heads * value)


def _feed_forward(table: _Table, layer: str, block: str, kind: str, inner: int) -> None:
    """A dense feed-forward layer, or the shared experts (`kind`: "_shexp")."""
    hidden = table.config["hidden_size"]
    for part, shape in (("gate", (inner, hidden)), ("up", (inner, hidden)), ("down", (hidden, inner))):
        table.add(f"{layer}{part}_proj.weight", f"{block}ffn_{part}{kind}.weight", *shape)
        if table.config.get("mlp_bias"):
            table.add(f"{layer}{part}_proj.bias", f"{block}ffn_{part}{kind}.bias", shape[0])


def _experts(table: _Table, layer: str, block: str) -> None:
    """A mixture of experts. The bias that only chooses them stays exact: rounding it would choose others."""
    config = table.config
    hidden, inner, experts = config["hidden_size"], config["moe_intermediate_size"], table.num_experts
    table.add(f"{layer}gate.weight", f"{block}ffn_gate_inp.weight", experts, hidden)
    if config.get("scoring_func") == "sigmoid":
        table.add(f"{layer}gate.e_score_correction_bias", f"{block}exp_probs_b.bias", experts, exact=True)
    for part, shape in (("gate", (inner, hidden)), ("up", (inner, hidden)), ("down", (hidden, inner))):
        table.add_stack(f"{layer}experts.{{}}.{part}_proj.weight", f"{block}ffn_{part}_exps.weight", *shape)
    if shared := config.get("n_shared_experts"):
        _feed_forward(table, f"{layer}shared_experts.", block, "_shexp", inner * shared)


def _compare(file: GGUFFile, wanted: dict[str, Shape], ignored: set[str]) -> None:
    """Raises PullError where the file's tensors are not the wanted ones."""
    missing = sorted(set(wanted) - file.tensor_names)
    extra = sorted(file.tensor_names - set(wanted) - ignored)
    wrong = [f"{n} {list(file.shape(n))}" for n, shape in wanted.items() if n not in missing and file.shape(n) != shape]
    for problem, names in (("missing", missing), ("unknown", extra), ("of the wrong shape", wrong)):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise PullError(f"{file.path}: tensors {problem}: {', '.join(map(shown, names[:5]))}{more}")
