"""The decoder in float64 NumPy, one sequence and one head at a time, written from the papers: the golden reference."""

from __future__ import annotations

import itertools
import math

import numpy as np

erf = np.vectorize(math.erf)
ACTIVATIONS = {
    "gelu": lambda x: 0.5 * x * (1 + erf(x / np.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
    "silu": lambda x: x / (1 + np.exp(-x)),
}
GATES = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", "reglu": "relu"}


def decoder_logits(config, weights: dict[str, np.ndarray], tokens: list[int]) -> np.ndarray:
    """Logits ``[T, V]``; ``weights`` maps parameter paths to float64 arrays, layers stacked in layer_groups."""
    scale = (np.sqrt(config.width) if config.embed_scale else 1.0) * config.embedding_multiplier
    x = weights["embed/table"][tokens] * scale
    positions = np.arange(len(tokens)) + config.position_offset
    if config.positions == "learned":
        x = x + weights["decoder/pos/table"][positions]
    if config.positions.startswith("sinusoidal"):
        last = config.width / 2 - (config.positions == "sinusoidal_t2t")  # index of the wavelength 10000 * 2 pi
        angle = positions[:, None] / 10000 ** (np.arange(config.width // 2) / last)
        x = x + np.concatenate([np.sin(angle), np.cos(angle)], 1)
    if config.embed_norm:
        x = norm(config, x, weights, "decoder/embed_norm")
    number = 0
    kinds = [config.experts > 0 and i not in config.dense_layers for i in range(config.layers)]
    layer_groups = config.layer_groups or [len(list(run)) for _, run in itertools.groupby(kinds)]
    for layer_group, count in enumerate(layer_groups):
        prefix = f"decoder/layers/{layer_group}/"
        for i in range(count):
            layer = {k.removeprefix(prefix): v[i] for k, v in weights.items() if k.startswith(prefix)}
            window = config.windows[number % len(config.windows)] if config.windows else 0
            relative = weights.get("decoder/rel/table")
            parts = [
                ("attn", lambda h, n=number, w=window, p=layer, r=relative: attention(config, h, p, n, w, r)),
                ("mlp", lambda h, p=layer: (moe if "mlp/router/kernel" in p else mlp)(config, h, p)),
            ]
            if config.parallel:
                norms = ["attn_norm", "attn_norm" if config.shared_norm else "mlp_norm"]
                added = sum(inner(norm(config, x, layer, name)) for name, (_, inner) in zip(norms, parts, strict=True))
                x = x + config.residual_multiplier * added
                parts = []
            for name, inner in parts:
                match config.norm_position:
                    case "pre":
                        x = x + config.residual_multiplier * inner(norm(config, x, layer, f"{name}_norm"))
                    case "post":
                        x = norm(config, x + inner(x), layer, f"{name}_norm")
                    case "output":
                        x = x + norm(config, inner(x), layer, f"{name}_norm")
                    case "sandwich":
                        y = inner(norm(config, x, layer, f"{name}_norm"))
                        x = x + norm(config, y, layer, f"{name}_out_norm")
            number += 1
    if config.norm_position != "post":
        x = norm(config, x, weights, "decoder/final_norm")
    logits = x @ (weights["embed/table"].T if config.tie_embeddings else weights["head/kernel"])
    return cap((logits + weights.get("logits_bias", 0)) * config.logits_multiplier, config.logit_softcap)


def cap(x, c):
    return c * np.tanh(x / c) if c else x


def norm(config, x, weights, name):
    if config.norm == "layernorm":
        x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * weights.get(f"{name}/scale", 1)
    return x + weights.get(f"{name}/bias", 0)


def linear(x, weights, name):
    return x @ weights[f"{name}/kernel"] + weights.get(f"{name}/bias", 0)


def mlp(config, x, weights):
    up = linear(x, weights, "mlp/up")
    if config.activation == "xielu":
        return linear(xielu(up, weights["mlp/act/positive"], weights["mlp/act/negative"]), weights, "mlp/down")
    act = ACTIVATIONS[GATES.get(config.activation, config.activation)]
    hidden = act(linear(x, weights, "mlp/gate")) * up if config.gated else act(up)
    return linear(hidden, weights, "mlp/down")


def xielu(x, positive, negative):
    a, b = np.log1p(np.exp(positive)), 0.5 + np.log1p(np.exp(negative))
    return x / 2 + np.where(x > 0, a * x**2, b * (np.exp(np.minimum(x, 0)) - 1 - x))


def moe(config, x, weights):
    """One token and one expert at a time."""
    out = np.zeros_like(x)
    for t, row in enumerate(x):
        logits = row @ weights["mlp/router/kernel"] + weights.get("mlp/router/bias", 0)
        p = 1 / (1 + np.exp(-logits)) if config.router_scores == "sigmoid" else np.exp(logits) / np.exp(logits).sum()
        ranking = p + weights.get("mlp/router/correction_bias", 0)
        if config.n_group > 1:
            groups = ranking.reshape(config.n_group, -1)
            kept = np.argsort(-np.sort(groups, -1)[:, -2:].sum(-1))[: config.topk_group]
            ranking = np.where(np.isin(np.arange(config.n_group), kept)[:, None], groups, -np.inf).reshape(-1)
        chosen = np.argsort(-ranking)[: config.experts_per_token]
        share = p[chosen] / (p[chosen].sum() if config.expert_renormalize else 1) * config.routed_scaling_factor
        for weight, e in zip(share, chosen, strict=True):
            of_expert = {
                k.replace("mlp/experts/", ""): v[e] for k, v in weights.items() if k.startswith("mlp/experts/")
            }
            if config.scale_expert_inputs:
                out[t] += gated_mlp(config, weight * row, of_expert)
            else:
                out[t] += weight * gated_mlp(config, row, of_expert)
        if config.shared_expert_ffn:
            shared = {k.replace("mlp/shared/", ""): v for k, v in weights.items() if k.startswith("mlp/shared/")}
            gate = 1 / (1 + np.exp(-row @ weights["mlp/shared_gate/kernel"])) if config.shared_expert_gate else 1
            out[t] += gate * gated_mlp(config, row, shared)
    return out


def gated_mlp(config, x, weights):
    gate, up = (x @ weights[f"{name}/kernel"] + weights.get(f"{name}/bias", 0) for name in ("gate", "up"))
    if config.activation == "clamped_swiglu":
        gate, up = np.minimum(gate, config.swiglu_limit), np.clip(up, -config.swiglu_limit, config.swiglu_limit)
        h = (up + 1) * gate / (1 + np.exp(-config.swiglu_alpha * gate))
    else:
        h = ACTIVATIONS[GATES[config.activation]](gate) * up
    return h @ weights["down/kernel"] + weights.get("down/bias", 0)


def rotate(x, position, theta, config):
    size = int(len(x) * config.rotary_fraction)
    half = size // 2
    out = x.copy()
    for i in range(half):
        angle = position * theta ** (-2 * i / size)
        a, b = (2 * i, 2 * i + 1) if config.rope_interleaved else (i, i + half)
        pair = complex(x[a], x[b]) * complex(np.cos(angle), np.sin(angle))
        out[a], out[b] = pair.real, pair.imag
    return out


def bucket(config, distance):
    """T5's bucket of a causal distance."""
    exact = config.relative_buckets // 2
    if distance < exact:
        return distance
    far = np.log(distance / exact) / np.log(config.relative_max_distance / exact) * (config.relative_buckets - exact)
    return min(exact + int(far), config.relative_buckets - 1)


def attention(config, x, weights, number, window, relative):
    K, T = config.d_head, len(x)
    theta = config.rope_local_theta if window and config.rope_local_theta else config.rope_theta
    q, k, v = (linear(x, weights, f"attn/{name}") for name in "qkv")
    if config.qk_norm == "width":
        q, k = norm(config, q, weights, "attn/q_norm"), norm(config, k, weights, "attn/k_norm")
    if config.clip_qkv:
        q, k, v = (np.clip(each, -config.clip_qkv, config.clip_qkv) for each in (q, k, v))
    q, k, v = (each.reshape(T, -1, K) for each in (q, k, v))

    def head_norms(q, k):
        if config.qk_norm not in ("head", "each_head"):
            return q, k
        return norm(config, q, weights, "attn/q_norm"), norm(config, k, weights, "attn/k_norm")

    q, k = (q, k) if config.qk_norm_after_rope else head_norms(q, k)
    if config.positions == "rotary" and number not in config.nope_layers:
        q, k = (
            np.array([[rotate(row, t, theta, config) for row in rows] for t, rows in enumerate(each)])
            for each in (q, k)
        )
    q, k = head_norms(q, k) if config.qk_norm_after_rope else (q, k)
    if config.attention_temperature:
        steps = np.arange(T) // config.temperature_interval
        q = q * (1 + config.attention_temperature * np.log(1 + steps))[:, None, None]
    out = np.zeros((T, config.heads, K))
    for head in range(config.heads):
        group = head // (config.heads // config.n_kv_heads)
        for t in range(T):
            keys = [s for s in range(t + 1) if not window or t - s < window]
            logits = []
            for s in keys:
                a, b = q[t, head], k[s, group]
                scale = config.attention_scale or K**-0.5
                scale /= number + 1 if config.attention_scale_by_layer else 1
                logit = cap(a @ b * scale, config.attention_softcap)
                logits.append(logit + (relative[bucket(config, t - s), head] if relative is not None else 0))
            p = np.exp(np.array(logits) - max(logits))
            sink = np.exp(weights["attn/sinks"][head] - max(logits)) if config.attention_sinks else 0
            out[t, head] = (p / (p.sum() + sink)) @ v[keys, group]
    return linear(out.reshape(T, -1), weights, "attn/o")
