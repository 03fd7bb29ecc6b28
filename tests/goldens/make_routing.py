#!/usr/bin/env python3
"""Write the expert choices of a golden case: python3 make_routing.py DIR (needs numpy).

Runs the plain formulas of bailing_moe_linear in float64 over DIR/model.safetensors and the tokens of
DIR/golden.safetensors, checks its log-probabilities against the golden ones, and writes DIR/routing.safetensors:
expert [T, MoE layers, k] int32, ascending; gap [T, MoE layers] float32, the routing gap (moe/router.h);
shifted_logprob [T - 1] float32, log-probabilities of a run forced to the experts (expert + 1) mod E instead."""
import json
import math
import os
import struct
import sys

import numpy as np


def read(path):
    """Every tensor of a safetensors file, BF16 as float32."""
    with open(path, "rb") as file:
        raw = file.read()
    size, tensors = struct.unpack("<Q", raw[:8])[0], {}
    for name, entry in json.loads(raw[8:8 + size]).items():
        if name == "__metadata__":
            continue
        begin, end = (8 + size + offset for offset in entry["data_offsets"])
        if entry["dtype"] == "BF16":
            values = (np.frombuffer(raw[begin:end], "<u2").astype(np.uint32) << 16).view(np.float32)
        else:
            values = np.frombuffer(raw[begin:end], {"F32": "<f4", "I32": "<i4"}[entry["dtype"]])
        tensors[name] = values.reshape(entry["shape"])
    return tensors


def write(path, tensors):
    header, data = {}, b""
    for name, values in tensors.items():
        begin, data = len(data), data + values.tobytes()
        dtype = {np.dtype(np.int32): "I32", np.dtype(np.float32): "F32"}[values.dtype]
        header[name] = {"dtype": dtype, "shape": values.shape, "data_offsets": [begin, len(data)]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + data)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def ffn(x, gate, up, down):
    a = x @ gate.T
    return (a * sigmoid(a) * (x @ up.T)) @ down.T


def rms(x, weight, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def slopes(heads, layer, layers):
    """Decay of a step is exp(-slope); layer factor A, fp32 as in the model."""
    def powers(n):
        return [2.0 ** (-8 * (i + 1) / n) for i in range(n)]
    largest = 2 ** int(math.log2(heads))
    base = powers(heads) if largest == heads else powers(largest) + powers(2 * largest)[0::2][:heads - largest]
    return (np.float32(base) * np.float32(1 - layer / max(layers - 1, 1) + 1e-5)).astype(np.float64)


class Model:
    def __init__(self, directory):
        with open(os.path.join(directory, "config.json")) as file:
            self.config = json.load(file)
        self.tensors = {name: values.astype(np.float64) for name, values in
                        read(os.path.join(directory, "model.safetensors")).items()}
        self.expert, self.gap, self.forced = [], [], None

    def rotate(self, x):
        """x [T, heads, D]: the first R channels, halves paired."""
        half = int(self.config["head_dim"] * self.config["partial_rotary_factor"]) // 2
        angle = np.arange(len(x))[:, None] * self.config["rope_theta"] ** -(np.arange(half) / half)
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
        a, b = x[..., :half], x[..., half:2 * half]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin, x[..., 2 * half:]], -1)

    def heads(self, x, name, kv_heads):
        c, w = self.config, lambda part: self.tensors[name + part]
        count, dim = c["num_attention_heads"], c["head_dim"]
        qkv = (x @ w("query_key_value.weight").T).reshape(len(x), count + 2 * kv_heads, dim)
        q, k, v = np.split(qkv, [count, count + kv_heads], 1)
        q = self.rotate(rms(q, w("query_layernorm.weight"), c["rms_norm_eps"])) * dim ** -0.5
        return q, self.rotate(rms(k, w("key_layernorm.weight"), c["rms_norm_eps"])), v

    def softmax(self, x, name):
        kv_heads = self.config["num_key_value_heads"]
        q, k, v = self.heads(x, name, kv_heads)
        k, v = (np.repeat(t, q.shape[1] // kv_heads, 1) for t in (k, v))
        s = np.einsum("ihd,jhd->hij", q, k)
        s = np.where(np.tri(len(x), dtype=bool), s, -np.inf)
        p = np.exp(s - s.max(-1, keepdims=True))
        o = np.einsum("hij,jhd->ihd", p / p.sum(-1, keepdims=True), v)
        return o.reshape(len(x), -1) @ self.tensors[name + "dense.weight"].T

    def linear(self, x, name, layer):
        c = self.config
        q, k, v = self.heads(x, name, c["num_attention_heads"])
        slope = slopes(c["num_attention_heads"], layer, c["num_hidden_layers"])
        distance = np.arange(len(x))[:, None] - np.arange(len(x))
        decay = np.where(distance >= 0, np.exp(-slope[:, None, None] * np.maximum(distance, 0)), 0)
        o = np.einsum("hij,jhd->ihd", np.einsum("ihd,jhd->hij", q, k) * decay, v)
        o = o.reshape(len(x), c["group_norm_size"], -1)
        o = rms(o, 1, c["rms_norm_eps"]).reshape(len(x), -1) * self.tensors[name + "g_norm.weight"]
        return (o * sigmoid(x @ self.tensors[name + "g_proj.weight"].T)) @ self.tensors[name + "dense.weight"].T

    def choose(self, score):
        """Chosen experts, ascending, and the routing gap of one row of biased scores."""
        c, groups = self.config, self.config["n_group"]
        margin = lambda order, values, n: values[order[n - 1]] - values[order[n]] if len(order) > n else np.inf
        group = np.sort(score.reshape(groups, -1), -1)[:, -2:].sum(-1)
        best = np.argsort(-group, kind="stable")
        kept = np.sort(best[:c["topk_group"]])
        candidates = np.arange(len(score)).reshape(groups, -1)[kept].ravel()
        order = candidates[np.argsort(-score[candidates], kind="stable")]
        k = c["num_experts_per_tok"]
        return np.sort(order[:k]), min(margin(best, group, c["topk_group"]), margin(order, score, k))

    def experts(self, x, name):
        c, w = self.config, self.tensors
        score = sigmoid(x @ w[name + "gate.weight"].T)
        choices = [self.choose(row) for row in score + w[name + "gate.expert_bias"]]
        expert, gap = np.array([e for e, _ in choices]), np.array([g for _, g in choices])
        if self.forced is not None:
            expert = self.forced[len(self.expert)]
        self.expert.append(expert)
        self.gap.append(gap)
        weight = np.take_along_axis(score, expert, -1)
        weight *= c["routed_scaling_factor"] / (weight.sum(-1, keepdims=True) + 1e-20)
        three = lambda part: [w[f"{name}{part}.{p}_proj.weight"] for p in ("gate", "up", "down")]
        y = ffn(x, *three("shared_experts"))
        for e in range(c["num_experts"]):
            row, slot = np.nonzero(expert == e)
            y[row] += weight[row, slot, None] * ffn(x[row], *three(f"experts.{e}"))
        return y

    def logprob(self, ids):
        c, w = self.config, self.tensors
        x = w["model.word_embeddings.weight"][ids]
        for l in range(c["num_hidden_layers"]):
            name = f"model.layers.{l}."
            y = rms(x, w[name + "input_layernorm.weight"], c["rms_norm_eps"])
            group = c["layer_group_size"]
            softmax = (l + 1) % group == 0 or l >= c["num_hidden_layers"] // group * group
            x = x + (self.softmax(y, name + "attention.") if softmax else self.linear(y, name + "attention.", l))
            y = rms(x, w[name + "post_attention_layernorm.weight"], c["rms_norm_eps"])
            dense = l < c["first_k_dense_replace"]
            x = x + (ffn(y, *(w[f"{name}mlp.{p}_proj.weight"] for p in ("gate", "up", "down"))) if dense
                     else self.experts(y, name + "mlp."))
        z = rms(x, w["model.norm.weight"], c["rms_norm_eps"]) @ w["lm_head.weight"].T
        z -= z.max(-1, keepdims=True)
        z -= np.log(np.exp(z).sum(-1, keepdims=True))
        return z[np.arange(len(ids) - 1), ids[1:]]


def main(directory):
    golden, model = read(os.path.join(directory, "golden.safetensors")), Model(directory)
    off = np.abs(model.logprob(golden["input_ids"]) - golden["logprob"]).max()
    expert, gap = np.stack(model.expert, 1).astype(np.int32), np.stack(model.gap, 1).astype(np.float32)
    print(f"{directory}: log-probabilities within {off:.1e}, smallest gaps {np.sort(gap.ravel())[:4]}")
    if not off < 1e-5:
        sys.exit("not the golden run; nothing is written")
    model.forced = [(e + 1) % model.config["num_experts"] for e in model.expert]
    model.expert = []
    shifted = model.logprob(golden["input_ids"]).astype(np.float32)
    print(f"{directory}: shifted experts move log-probabilities by {np.abs(shifted - golden['logprob']).mean():.3f}")
    write(os.path.join(directory, "routing.safetensors"), {"expert": expert, "gap": gap, "shifted_logprob": shifted})


if __name__ == "__main__":
    main(sys.argv[1])
