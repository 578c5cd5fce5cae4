"""FiRST's training forward and its losses in NumPy, one segment, layer and token at a time.

Written from the formulas in `depth/first.py`, on sequences that were never packed or padded.
"""

import math

import numpy as np


def sigmoid(x: float) -> float:
    """1 / (1 + exp(-x))."""
    return 1.0 / (1.0 + math.exp(-x))


def router(w, b, h, normalise: bool) -> list[float]:
    """r_l(t) for every token of `h` [T,D]."""
    out = []
    for token in h:
        scale = math.sqrt(sum(float(v) ** 2 for v in token) / len(token) + 1e-6)
        dot = sum(float(x) * float(y) for x, y in zip(w, token, strict=True))
        out.append(sigmoid((dot / scale if normalise else dot) + float(b)))
    return out


def sequence(block, routers, h, prompt: list[bool], cfg, *, hard: bool):
    """One sequence through all layers: (last states [T,D], a list of facts a layer).

    `block(l, h)` is layer l. `prompt` marks prompt tokens; those before the first other token
    decide. Facts: p, mean (over the tokens that are penalised), keep.
    """
    num_layers, tokens = len(routers["b"]), len(h)
    end = prompt.index(False) if False in prompt else tokens
    always = {layer % num_layers for layer in cfg.decision.always_keep}
    facts = []
    for layer in range(num_layers):
        r = router(routers["w"][layer], routers["b"][layer], h, cfg.decision.normalise)
        p = sum(r[:end]) / end if end else 0.0
        keep = end == 0 or layer in always or p >= cfg.decision.threshold
        mean = p if cfg.penalty_tokens == "prompt" else sum(r) / tokens
        facts.append({"p": p, "mean": mean, "keep": keep})
        new, out = block(layer, h), []
        for t in range(tokens):
            if hard:
                gate = 1.0 if keep else 0.0
            elif layer in always or end == 0:
                gate = 1.0
            else:
                gate = p if cfg.gate == "sequence" else r[t]
                if cfg.form == "straight_through":
                    gate = 1.0 if gate >= cfg.decision.threshold else 0.0
            if cfg.scope == "decode_only" and t < end:
                gate = 1.0
            out.append(gate * new[t] + (1.0 - gate) * h[t])
        h = np.stack(out)
    return h, facts


def penalties(facts, routers, cfg) -> dict[str, float]:
    """The three terms, each a mean over sequences; `facts` is a list of `sequence`'s."""
    num_layers = len(routers["b"])
    always = {layer % num_layers for layer in cfg.decision.always_keep}
    routed = [layer for layer in range(num_layers) if layer not in always]
    keep, reg, rate = [], [], []
    for of_layers in facts:
        means = [of_layers[layer]["mean"] for layer in routed]
        keep.append(sum(means) / len(routed))
        reg.append(sum(m * (1 - m) for m in means) / len(routed))
        rate.append((keep[-1] - cfg.rate_target) ** 2)
    if cfg.regulariser == "l2":
        reg = [sum(float(w) ** 2 for row in routers["w"] for w in row)]
    if cfg.rate_over == "batch":
        rate = [(np.mean(keep) - cfg.rate_target) ** 2]
    return {"keep": float(np.mean(keep)), "reg": float(np.mean(reg)), "rate": float(np.mean(rate))}
