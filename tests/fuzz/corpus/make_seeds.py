#!/usr/bin/env python3
"""Write the seed inputs of the fuzz targets into this folder."""
import json
import pathlib
import struct

here = pathlib.Path(__file__).parent


def put(target, name, data):
    (here / target).mkdir(exist_ok=True)
    (here / target / name).write_bytes(data)


def safetensors(header, data, pad=0):
    text = (header if isinstance(header, str) else json.dumps(header)).encode() + b" " * pad
    return struct.pack("<Q", len(text)) + text + data


put("safetensors", "one", safetensors(
    {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, bytes(8)))
put("safetensors", "many", safetensors(
    {"__metadata__": {"format": "pt"},
     "w": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [4, 16]},
     "s": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]},
     "e": {"dtype": "U8", "shape": [0, 5], "data_offsets": [16, 16]}}, bytes(16), 7))
put("safetensors", "none", safetensors({}, b""))
put("safetensors", "twice", safetensors(
    '{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
    '"\\u0061":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}', bytes(2)))
put("safetensors", "overflow", safetensors(
    {"a": {"dtype": "U64", "shape": [4294967296, 4294967296], "data_offsets": [0, 0]}}, b""))

config = {
    "model_type": "bailing_moe_linear", "hidden_size": 64, "num_hidden_layers": 5,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "layer_group_size": 5,
    "first_k_dense_replace": 1, "intermediate_size": 160, "moe_intermediate_size": 24,
    "num_experts": 16, "num_experts_per_tok": 4, "num_shared_experts": 1, "n_group": 4,
    "topk_group": 2, "norm_topk_prob": True, "routed_scaling_factor": 2.5,
    "moe_router_enable_expert_bias": True, "use_qk_norm": True, "group_norm_size": 2,
    "partial_rotary_factor": 0.5, "rope_theta": 1000000.0, "rope_scaling": None,
    "max_position_embeddings": 1048576, "rms_norm_eps": 1e-06, "vocab_size": 512}
put("json", "config", b"c" + json.dumps(config).encode())
config["rope_scaling"] = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 131072}
config["sliding_window"] = 128
put("json", "config_yarn", b"c" + json.dumps(config).encode())
put("json", "text", b'j{"a":[1,-2.5e3,true,false,null,"\\ud83d\\ude00\\n"],"b":{"c":{}}}')
put("json", "index", b'i{"metadata":{"total_size":16},"weight_map":{"one":"a.safetensors",'
                     b'"two":"b.safetensors"}}')
put("json", "index_path", b'i{"weight_map":{"one":"../a.safetensors"}}')
put("json", "kv_empty", b'k' + json.dumps({
    "format": "ring-kv/1", "model_type": "bailing_moe_linear", "model_digest": "xxh3:0",
    "tokenizer_digest": "", "decay_factor": "A", "tokens": 4, "token_ids": "tokens.u32.npy",
    "tail_token_ids": [5], "tile": 2, "dtype": "F32",
    "layers": [{"i": 0, "kind": "linear", "tensors": ["state"]},
               {"i": 1, "kind": "full", "tensors": ["k", "v"]}],
    "rope": {"theta": 600000, "rotary_dim": 4, "scaling": "none", "factor": 1,
             "attention_factor": 1, "applied": True},
    "layout": "[tokens, kv_heads, head_dim]", "order": "logical",
    "shards": [{"file": "kv-00001-of-00001.safetensors", "bytes": 4224, "digest": "xxh3:0",
                "token_range": [0, 4]}],
    "states": {"file": "states.safetensors", "bytes": 4224, "digest": "xxh3:0"}}).encode())


def npy(descr, shape, data, major=1):
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    length = struct.pack("<H" if major == 1 else "<I", len(text))
    return b"\x93NUMPY" + bytes([major, 0]) + length + text + data


put("npy", "u2", npy("<u2", "(3,)", struct.pack("<3H", 1, 2, 3)))
put("npy", "u4", npy("<u4", "(2,)", struct.pack("<2I", 1, 70000), 2))
put("npy", "i4", npy("<i4", "(1,)", struct.pack("<i", -1)))
put("npy", "i8", npy("<i8", "(2,)", struct.pack("<2q", 1, 1 << 40), 3))
put("npy", "f4", npy("<f4", "(1,)", struct.pack("<f", 1)))
put("npy", "bin16", struct.pack("<256i", 20240520, 1, 2, *([0] * 253)) + struct.pack("<2H", 7, 9))
put("npy", "bin32", struct.pack("<256i", 20240801, 7, 1, *([0] * 253)) + struct.pack("<I", 70000))
