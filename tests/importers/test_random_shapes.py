"""Importers meet their formulae at shapes and options that no recording has."""

import random

import pytest
import source_names
import torch
import written_out
from safetensors.torch import save_file

from recurgolf import importers


def sizes(chance):
    heads = chance.choice([1, 2, 3, 4, 6])
    dim = heads * chance.choice([4, 6, 8, 10])
    shared = chance.choice([n for n in range(1, heads + 1) if heads % n == 0])
    return {
        "vocab_size": chance.choice([17, 40, 61]),
        "model_dim": dim,
        "num_heads": heads,
        "num_kv_heads": shared,
        "logit_softcap": chance.choice([5.0, 30.0, 50.0]),
        "rope_base": chance.choice([100.0, 10_000.0]),
        "train_seq_len": 12,
    }


def kv_dim(h):
    return h["model_dim"] // h["num_heads"] * h["num_kv_heads"]


def block_shapes(h, blocks):
    dim, kv, hidden = h["model_dim"], kv_dim(h), int(h["mlp_mult"] * h["model_dim"])
    names = {
        "attn.c_q.weight": (dim, dim),
        "attn.c_k.weight": (kv, dim),
        "attn.c_v.weight": (kv, dim),
        "attn.proj.weight": (dim, dim),
        "attn.q_gain": (h["num_heads"],),
        "mlp.fc.weight": (hidden, dim),
        "mlp.proj.weight": (dim, hidden),
        "attn_scale": (dim,),
        "mlp_scale": (dim,),
        "resid_mix": (2, dim),
    }
    return {f"blocks.{i}.{name}": shape for i in range(blocks) for name, shape in names.items()}


def baseline(chance):
    h = sizes(chance) | {
        "num_layers": chance.choice([1, 2, 3, 5]),
        "mlp_mult": chance.choice([1, 2, 3]),
        "tie_embeddings": chance.random() < 0.6,
    }
    dim, vocab = h["model_dim"], h["vocab_size"]
    shapes = {"tok_emb.weight": (vocab, dim), "skip_weights": (h["num_layers"] // 2, dim)}
    shapes |= block_shapes(h, h["num_layers"])
    if not h["tie_embeddings"]:
        shapes["lm_head.weight"] = (vocab, dim)
    return h, shapes


def parallel_recurrent(chance):
    h = sizes(chance) | {
        "num_unique_layers": chance.choice([1, 2, 3]),
        "num_recurrences": chance.choice([1, 2, 4]),
        "num_eval_recurrences": chance.choice([0, 0, 1, 5]),
        "mlp_mult": chance.choice([1, 2, 4]),
    }
    shapes = {"tok_emb.weight": (h["vocab_size"], h["model_dim"])}
    return h, shapes | block_shapes(h, h["num_unique_layers"])


def per_iteration_lora(chance):
    h = sizes(chance)
    dim, vocab, kv, blocks = h["model_dim"], h["vocab_size"], kv_dim(h), chance.randrange(1, 7)
    start = chance.randrange(blocks)
    end, loops = chance.randrange(start, blocks), chance.choice([0, 1, 2, 3])
    wide = chance.choice([dim, dim, dim + 4, 8])
    h |= {
        "num_layers": blocks,
        "embedding_dim": wide,
        "mlp_mult": chance.choice([1.5, 2.0, 4.0]),
        "tie_embeddings": chance.random() < 0.6,
        "rope_dims": chance.choice([0, 4]),
        "num_loops": loops,
        "loop_start": start,
        "loop_end": end,
        "lora_rank": chance.choice([0, 1, 2, 4]),
        "xsa_last_n": chance.choice([0, 1, 2, blocks, 11]),
        "parallel_residual_start": chance.choice([-1, 0, 1, 2, 7]),
        "skip_gates_enabled": chance.random() < 0.5,
        "ln_scale": chance.random() < 0.5,
        "mtp_num_heads": chance.choice([0, 0, 1, 3]),
        "mtp_loss_weight": 0.3,
    }
    pairs = (blocks + loops * (end - start + 1)) // 2
    shapes = {"tok_emb.weight": (vocab, wide), "skip_weights": (pairs, dim)}
    shapes |= block_shapes(h, blocks)
    if wide != dim:
        shapes |= {"embed_proj.weight": (dim, wide), "head_proj.weight": (wide, dim)}
    if h["skip_gates_enabled"]:
        shapes["skip_gates"] = (pairs, dim)
    if not h["tie_embeddings"]:
        shapes["lm_head.weight"] = (vocab, wide)
    shapes |= {f"mtp_heads.{k}.weight": (vocab, dim) for k in range(h["mtp_num_heads"])}
    rank = h["lora_rank"]
    for loop in range(loops if rank else 0):
        for block in range(end - start + 1):
            for name, out in (("q", dim), ("k", kv), ("v", kv), ("proj", dim)):
                at = f"lora_adapters.{loop}.{block}.{name}"
                shapes |= {f"{at}_A": (dim, rank), f"{at}_B": (rank, out)}
    return h, shapes


def universal_rank1(chance):
    h = sizes(chance)
    dim, vocab, kv = h["model_dim"], h["vocab_size"], kv_dim(h)
    prelude, shared, coda, loops = (chance.choice(n) for n in ([0, 1, 2], [1, 2, 3]) * 2)
    blocks, visits = prelude + shared + coda, prelude + shared * loops + coda
    receiving = chance.sample(range(visits), chance.randrange(min(4, visits) + 1))
    h |= {
        "num_prelude": prelude,
        "num_shared": shared,
        "num_coda": coda,
        "num_loops": loops,
        "mlp_mult": chance.choice([1.5, 2.0, 3.0]),
        "tie_embeddings": chance.random() < 0.7,
        "rope_dims": chance.choice([0, 4]),
        "R1_LORA": chance.choice([0, 1]),
        "xsa_last_n": chance.choice([0, 1, 3, 50]),
        "ln_scale": chance.random() < 0.5,
        "dtg": chance.random() < 0.4,
        "bigram_vocab_size": chance.choice([0, 19, 47]),
        "bigram_dim": chance.choice([dim, 6]),
        "ve_enabled": chance.random() < 0.6,
        "ve_dim": chance.choice([kv, 5]),
        "ve_layers": ",".join(map(str, receiving)),
        "mtp_num_heads": chance.choice([0, 0, 2]),
        "mtp_loss_weight": 0.3,
    }
    hidden = int(h["mlp_mult"] * dim)
    shapes = {
        "tok_emb.weight": (vocab, dim),
        "smear.gate": (dim,),
        "qo_bank": (2 * blocks, dim, dim),
        "kv_bank": (2 * blocks, kv, dim),
        "mlp_up_bank": (blocks, hidden, dim),
        "mlp_down_bank": (blocks, dim, hidden),
        "ts_attn": (visits, dim),
        "ts_mlp": (visits, dim),
        "skip_weights": (1, dim) if prelude and coda else (0,),
    }
    for block in range(blocks):
        at = f"blocks.{block}."
        shapes[at + "attn.q_gain"] = (h["num_heads"],)
        if prelude <= block < prelude + shared:
            shapes[at + "resid_mix_logit"] = ()
        else:
            shapes |= {at + "attn_scale": (dim,), at + "mlp_scale": (dim,)}
            shapes[at + "resid_mix"] = (2, dim)
        if h["dtg"]:
            shapes |= {at + "dtg_gate.weight": (1, dim), at + "dtg_gate.bias": (1,)}
    if h["bigram_vocab_size"]:
        shapes["bigram.embed.weight"] = (h["bigram_vocab_size"], h["bigram_dim"])
        shapes["bigram.scale"] = ()
        if h["bigram_dim"] != dim:
            shapes["bigram.proj.weight"] = (dim, h["bigram_dim"])
    if h["ve_enabled"] and receiving:
        shapes |= {"ve_shared.embed.weight": (vocab, h["ve_dim"]), "ve_shared.scale": ()}
        if h["ve_dim"] != kv:
            shapes["ve_shared.proj.weight"] = (kv, h["ve_dim"])
        shapes |= {f"ve_layer_scales.{k}": (1,) for k in range(len(receiving))}
    if not h["tie_embeddings"]:
        shapes["lm_head.weight"] = (vocab, dim)
    shapes |= {f"mtp_heads.{k}.weight": (vocab, dim) for k in range(h["mtp_num_heads"])}
    if h["R1_LORA"]:
        ends = {"q": (dim, dim), "v": (dim, kv), "up": (dim, hidden), "down": (hidden, dim)}
        for name, (wide, out) in ends.items():
            shapes |= {f"r1_{name}_a": (shared * loops, wide)}
            shapes |= {f"r1_{name}_b": (shared * loops, out)}
    return h, shapes


DRAWS = {f.__name__: f for f in (baseline, per_iteration_lora, universal_rank1, parallel_recurrent)}


def filled(shapes, seed):
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        scale = 0.3 if len(shape) < 2 else shape[-1] ** -0.5
        one = name.endswith(("_scale", "gain", "ts_attn", "ts_mlp", "resid_mix", "skip_weights"))
        tensors[name] = one + scale * torch.randn(shape, generator=generator)
    return tensors


def expected(system, w, h, ids, targets, training, looping):
    """(logits, loss) by the formulae."""
    extra = 0.0
    if system == "baseline":
        logits = written_out.baseline(w, h, ids)
    elif system == "parallel_recurrent":
        logits = written_out.parallel_recurrent(w, h, ids, training)
    else:
        drops_last = system == "per_iteration_lora"
        if drops_last:
            logits, states = written_out.per_iteration_lora(w, h, ids, looping)
        else:
            logits, states = written_out.universal_rank1(w, h, ids)
        if training:
            extra = written_out.multi_token_loss(states, targets, w, h, int(drops_last))
    return logits, written_out.cross_entropy(logits, targets) + extra


def in_capitals(h):
    words = {True: "1", False: "0"}
    return {k.upper(): words[v] if isinstance(v, bool) else str(v) for k, v in h.items()}


# Length (the training length is 12), training mode, looping.
CASES = [(9, True, True), (9, True, False), (30, False, True), (2, True, True)]
SEEDS = [pytest.param(n, marks=[pytest.mark.slow] if n > 3 else []) for n in range(30)]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("system", DRAWS)
def test_logits_loss_and_gradients_follow_the_formulae(system, seed, tmp_path):
    h, shapes = DRAWS[system](random.Random(seed))
    weights = filled(shapes, seed)
    save_file(weights, tmp_path / "weights.safetensors")
    config = [h, {"hyperparameters": h}, in_capitals(h)][seed % 3]
    found = importers.load(system, config, tmp_path / "weights.safetensors")
    # In double, since a norm behind XSA makes much of the rounding at a sequence's start.
    model = found.model.double()
    generator = torch.Generator().manual_seed(seed)
    delayed = system == "per_iteration_lora"
    for length, training, looping in CASES:
        if not looping and not delayed:
            continue
        ids, targets = torch.randint(h["vocab_size"], (2, 2, length), generator=generator)
        w = {name: tensor.double().requires_grad_() for name, tensor in weights.items()}
        logits, loss = expected(system, w, h, ids, targets, training, looping)
        loss.backward()

        model.train(training)
        model.zero_grad()
        source_names.set_looping(found, looping)
        torch.testing.assert_close(model(ids), logits, atol=1e-5, rtol=1e-5, msg=str(h))
        mine = model.loss(ids, targets)
        torch.testing.assert_close(mine.double(), loss.double(), atol=1e-5, rtol=0, msg=str(h))
        mine.backward()
        gradients = source_names.gradients(found, weights)
        for name, tensor in w.items():
            want = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
            have = gradients.get(name, torch.zeros_like(tensor))
            allowed = 1e-5 + 1e-4 * want.abs().max().item() if want.numel() else 0.0
            torch.testing.assert_close(have, want, atol=allowed, rtol=0, msg=f"{name} {h}")
