"""The four systems written out straight from their formulae, over a source's own tensors.

Slow and naive on purpose: one function per system, no module, no part shared with the package. They
were held against the recorded models first; here they speak for shapes that nobody recorded.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = torch.finfo(torch.float32).eps
State = dict[str, Tensor]


def rms(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()


def turned(x: Tensor, dims: int, base: float) -> Tensor:
    """Rotate the first `dims` of [t, h, d], pair by pair."""
    out = x.clone()
    for i in range(dims // 2):
        angle = torch.arange(x.shape[0], dtype=torch.float32) * base ** (-2 * i / dims)
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        first, second = x[..., i], x[..., i + dims // 2]
        out[..., i] = first * cos + second * sin
        out[..., i + dims // 2] = second * cos - first * sin
    return out


def attention(
    x: Tensor, w: State, heads: int, kv_heads: int, dims: int, base: float, xsa: bool, add: State
) -> Tensor:
    """One sequence [t, d]; `w` has q, k, v, o, gain; `add` deltas by name and `value`."""
    length, dim = x.shape
    size = dim // heads
    none = torch.zeros(())
    q = (x @ w["q"].T + add.get("q", none)).view(length, heads, size)
    k = (x @ w["k"].T + add.get("k", none)).view(length, kv_heads, size)
    v = x @ w["v"].T + add.get("v", none)
    v = (v + add.get("value", none)).view(length, kv_heads, size)
    q = turned(rms(q), dims or size, base) * w["gain"][:, None]
    k = turned(rms(k), dims or size, base)
    past = torch.ones(length, length, dtype=torch.bool).tril()
    columns = []
    for head in range(heads):
        group = head // (heads // kv_heads)
        scores = q[:, head] @ k[:, group].T / math.sqrt(size)
        y = scores.masked_fill(~past, -math.inf).softmax(-1) @ v[:, group]
        if xsa:
            unit = v[:, group] / v[:, group].norm(dim=-1, keepdim=True).clamp_min(1e-12)
            y = y - (y * unit).sum(-1, keepdim=True) * unit
        columns.append(y)
    return torch.cat(columns, -1)


def capped(x: Tensor, cap: float) -> Tensor:
    return cap * torch.tanh(x / cap)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float().flatten(0, -2), targets.flatten())


def weights_of(w: State, block: int) -> State:
    at = f"blocks.{block}."
    names = {"q": "attn.c_q", "k": "attn.c_k", "v": "attn.c_v", "o": "attn.proj"}
    names |= {"up": "mlp.fc", "down": "mlp.proj"}
    found = {short: w[f"{at}{long}.weight"] for short, long in names.items()}
    found |= {"gain": w[at + "attn.q_gain"]}
    for name in ("attn_scale", "mlp_scale", "resid_mix"):
        if at + name in w:
            found[name] = w[at + name]
    return found


def relu2(x: Tensor) -> Tensor:
    return x.clamp_min(0) ** 2


def leaky2(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 0.5 * x) ** 2


def head(x: Tensor, w: State, h: dict[str, Any]) -> Tensor:
    if "head_proj.weight" in w:
        x = x @ w["head_proj.weight"].T
    matrix = w["tok_emb.weight"] if h.get("tie_embeddings", True) else w["lm_head.weight"]
    return capped(x @ matrix.T, h["logit_softcap"])


def each(function, ids: Tensor) -> Tensor:
    return torch.stack([function(row) for row in ids])


def baseline(w: State, h: dict[str, Any], ids: Tensor) -> Tensor:
    def row(ids: Tensor) -> Tensor:
        x = x0 = rms(w["tok_emb.weight"][ids])
        half, kept = h["num_layers"] // 2, []
        for block in range(h["num_layers"]):
            b = weights_of(w, block)
            if block >= half and kept:
                x = x + w["skip_weights"][block - half] * kept.pop()
            x = b["resid_mix"][0] * x + b["resid_mix"][1] * x0
            shape = (h["num_heads"], h["num_kv_heads"], 0, h["rope_base"], False, {})
            x = x + b["attn_scale"] * (attention(rms(x), b, *shape) @ b["o"].T)
            x = x + b["mlp_scale"] * (relu2(rms(x) @ b["up"].T) @ b["down"].T)
            if block < half:
                kept.append(x)
        return head(rms(x), w, h)

    return each(row, ids)


def parallel_recurrent(w: State, h: dict[str, Any], ids: Tensor, training: bool) -> Tensor:
    passes = h["num_recurrences"]
    if not training:
        passes = h["num_eval_recurrences"] or 2 * passes

    def row(ids: Tensor) -> Tensor:
        x = x0 = rms(w["tok_emb.weight"][ids])
        for _ in range(passes):
            for block in range(h["num_unique_layers"]):
                b = weights_of(w, block)
                x = b["resid_mix"][0] * x + b["resid_mix"][1] * x0
                n = rms(x)
                shape = (h["num_heads"], h["num_kv_heads"], 0, h["rope_base"], False, {})
                y = attention(n, b, *shape) @ b["o"].T
                z = relu2(n @ b["up"].T) @ b["down"].T
                x = x + b["attn_scale"] * y + b["mlp_scale"] * z
        return head(rms(x), w, h)

    return each(row, ids)


def stretched(h: dict[str, Any], length: int) -> float:
    dims = h["rope_dims"] or h["model_dim"] // h["num_heads"]
    if length <= h["train_seq_len"]:
        return h["rope_base"]
    return h["rope_base"] * (length / h["train_seq_len"]) ** (dims / (dims - 2))


def per_iteration_lora(
    w: State, h: dict[str, Any], ids: Tensor, looping: bool
) -> tuple[Tensor, Tensor]:
    """Logits, and the normed states that the multi-token heads read."""
    blocks, start, end = h["num_layers"], h["loop_start"], h["loop_end"]
    band = list(range(start, end + 1))
    looped = h["num_loops"] > 0 and looping
    order = list(range(blocks))
    if looped:
        order = order[:start] + band * (1 + h["num_loops"]) + order[end + 1 :]

    def row(ids: Tensor) -> Tensor:
        x = rms(w["tok_emb.weight"][ids])
        if "embed_proj.weight" in w:
            x = x @ w["embed_proj.weight"].T
        x0, kept, visits = x, [], [0] * blocks
        half = len(order) // 2
        for position, block in enumerate(order):
            if position >= half and kept:
                s = w["skip_weights"][position - half] * kept.pop()
                if h["skip_gates_enabled"]:
                    g = torch.sigmoid(w["skip_gates"][position - half])
                    x = (1 - g) * s + g * x
                else:
                    x = x + s
            b = weights_of(w, block)
            low: State = {}
            if visits[block] > 0 and h["lora_rank"] > 0:
                at = f"lora_adapters.{visits[block] - 1}.{block - start}."
                low = {n: w[at + n] for n in ("q_A", "q_B", "k_A", "k_B", "v_A", "v_B")}
                low |= {n: w[at + n] for n in ("proj_A", "proj_B")}
            visits[block] += 1
            factor = 1 / math.sqrt(block + 1) if h["ln_scale"] else 1.0
            x = b["resid_mix"][0] * x + b["resid_mix"][1] * x0
            n = factor * rms(x)
            add = {p: n @ low[p + "_A"] @ low[p + "_B"] for p in "qkv"} if low else {}
            xsa = h["xsa_last_n"] > 0 and block >= blocks - h["xsa_last_n"]
            base = stretched(h, len(ids))
            shape = (h["num_heads"], h["num_kv_heads"], h["rope_dims"], base, xsa, add)
            y = attention(n, b, *shape)
            y = y @ b["o"].T + (y @ low["proj_A"] @ low["proj_B"] if low else 0)
            if 0 <= h["parallel_residual_start"] <= block:
                z = leaky2(n @ b["up"].T) @ b["down"].T
                x = x + b["attn_scale"] * y + b["mlp_scale"] * z
            else:
                x = x + b["attn_scale"] * y
                z = leaky2(factor * rms(x) @ b["up"].T) @ b["down"].T
                x = x + b["mlp_scale"] * z
            if position < half:
                kept.append(x)
        return rms(x)

    states = each(row, ids)
    return head(states, w, h), states


def universal_rank1(w: State, h: dict[str, Any], ids: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, and the normed states that the multi-token heads read."""
    prelude, shared, coda = h["num_prelude"], h["num_shared"], h["num_coda"]
    count = prelude + shared + coda
    core = list(range(prelude, prelude + shared))
    order = list(range(prelude)) + core * h["num_loops"] + list(range(prelude + shared, count))
    last = h["xsa_last_n"]
    xsa = set(order[max(0, len(order) - last) :]) if last > 0 else set()
    receiving = [int(x) for x in h["ve_layers"].split(",") if x] if h["ve_enabled"] else []

    def row(ids: Tensor) -> Tensor:
        x = w["tok_emb.weight"][ids]
        if "bigram.embed.weight" in w:
            rows = h["bigram_vocab_size"]
            hashed = [rows - 1]
            for t in range(1, len(ids)):
                hashed.append(((36313 * int(ids[t])) ^ (27191 * int(ids[t - 1]))) % (rows - 1))
            pairs = w["bigram.embed.weight"][hashed]
            if "bigram.proj.weight" in w:
                pairs = pairs @ w["bigram.proj.weight"].T
            x = x + pairs * w["bigram.scale"]
        x = rms(x)
        g = torch.sigmoid(w["smear.gate"])
        x = (1 - g) * x + g * torch.cat((torch.zeros_like(x[:1]), x[:-1]))
        x0 = x
        values = torch.zeros(())
        if receiving:
            values = w["ve_shared.embed.weight"][ids]
            if "ve_shared.proj.weight" in w:
                values = values @ w["ve_shared.proj.weight"].T
            values = values * w["ve_shared.scale"]
        around, seen = None, 0
        for e, block in enumerate(order):
            in_core = prelude <= block < prelude + shared
            at = f"blocks.{block}."
            b = {
                "q": w["qo_bank"][block],
                "o": w["qo_bank"][count + block],
                "k": w["kv_bank"][block],
                "v": w["kv_bank"][count + block],
                "up": w["mlp_up_bank"][block],
                "down": w["mlp_down_bank"][block],
                "gain": w[at + "attn.q_gain"],
            }
            if in_core and h["R1_LORA"]:
                for name in ("q", "v", "up", "down"):
                    b[name] = b[name] + torch.outer(
                        w[f"r1_{name}_b"][seen], w[f"r1_{name}_a"][seen]
                    )
            seen += in_core
            if prelude and coda and e == prelude + shared * h["num_loops"]:
                x = x + w["skip_weights"][0] * around
            add = {}
            if e in receiving:
                add["value"] = values * w[f"ve_layer_scales.{receiving.index(e)}"]
            shape = (h["num_heads"], h["num_kv_heads"], h["rope_dims"], stretched(h, len(ids)))
            ts_a, ts_m = w["ts_attn"][e].clamp(-4, 4), w["ts_mlp"][e].clamp(-4, 4)
            if in_core:
                mix = torch.sigmoid(w[at + "resid_mix_logit"])
                start = x_in = mix * x + (1 - mix) * x0
                y = attention(x_in, b, *shape, block in xsa, add) @ b["o"].T
                x = x_in + ts_a * rms(y)
                x = x + ts_m * rms(leaky2(x @ b["up"].T) @ b["down"].T)
            else:
                f = 1 / math.sqrt(block + 1) if h["ln_scale"] else 1.0
                mix = w[at + "resid_mix"]
                start = x_in = mix[0] * x + mix[1] * x0
                y = attention(f * rms(x_in), b, *shape, block in xsa, add) @ b["o"].T
                x = x_in + ts_a * w[at + "attn_scale"] * y
                z = leaky2(f * rms(x) @ b["up"].T) @ b["down"].T
                x = x + ts_m * w[at + "mlp_scale"] * z
            if h["dtg"]:
                logit = start.detach() @ w[at + "dtg_gate.weight"].T + w[at + "dtg_gate.bias"]
                x = start + torch.sigmoid(logit) * (x - start)
            if e == prelude - 1:
                around = x
        return rms(x)

    states = each(row, ids)
    return head(states, w, h), states


def multi_token_loss(
    states: Tensor, targets: Tensor, w: State, h: dict[str, Any], dropped: int
) -> Tensor:
    """The extra heads' share: the mean over heads, times its weight."""
    losses = []
    for k in range(h["mtp_num_heads"]):
        used = states.shape[1] - 1 - k - dropped
        if used <= 0:
            continue
        logits = capped(states[:, :used] @ w[f"mtp_heads.{k}.weight"].T, h["logit_softcap"])
        losses.append(cross_entropy(logits, targets[:, k + 1 : k + 1 + used]))
    return h["mtp_loss_weight"] * sum(losses) / len(losses) if losses else torch.zeros(())
