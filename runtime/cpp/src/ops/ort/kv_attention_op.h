// The operators KvAttention, KvAttentionHalf and KvAttentionInt8 of domain `penguin`, opset 1.
//
// | input                              | shape            | dtype                                     |
// |------------------------------------|------------------|-------------------------------------------|
// | q                                  | [1, S, H * D]    | float32                                   |
// | k, v                               | [1, S, KV * D]   | float32                                   |
// | past_key, past_value               | [1, KV, C, D]    | float32; Half: float16; Int8: int8        |
// | start                              | [1]              | int64, the slot of the first new row      |
// | positions                          | [S]              | int64, the rotary position of each row    |
// | cos, sin                           | [M, D / 2]       | float32                                   |
// | past_key_scale, past_value_scale   | [1, KV, C]       | float32, Int8 alone                       |
//
// | output                                 | as               |
// |----------------------------------------|------------------|
// | attention                              | q                |
// | present_key, present_value             | past_key         |
// | present_key_scale, present_value_scale | past_key_scale   |
//
// Attributes: num_heads (H), kv_num_heads (KV), both int; scale, float, 0 or absent: 1 / sqrt(D).
// A past and its present that are bound to one buffer are updated in place; else the past is copied first.
// What it computes, and what it refuses, stands in attention.h.
#pragma once

#include "api.h"
#include "attention.h"

namespace penguin::ort {

// One of the three, for one copy of ONNX Runtime. It outlives the sessions that use it.
struct KvAttentionOp : OrtCustomOp {
    KvAttentionOp(const OrtApi& of, CacheType cache);
    const OrtApi* api;
    CacheType type;
};

}  // namespace penguin::ort
