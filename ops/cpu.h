// What cpu.cpp (threads, dispatch, the interface to Python) and cpu_kernels.cpp (one object per instruction set) share.
// cpu_library.py mirrors the structures. Sizes are in elements unless they are called bytes.

#pragma once
#include <stdint.h>

enum Kind : int32_t { FP32, BF16, INT8, INT4, FP8 };

// A linear layer. Floating weights are rows (N, K). Integers are packed (see packing.py): tiles of LANES rows, N padded
// to 16 of them, K to `padded`.
struct Linear {
  const void* weight;
  const void* scales;     // of rows: fp32 (N,); of groups: bf16 or fp16 (tiles, padded / group, LANES)
  const uint16_t* zeros;  // of groups: like scales, or null for int8
  const void* bias;       // (N,) or null
  int64_t N, K, padded;
  int32_t kind, group;  // group: columns with a scale, 0 for whole rows
  int32_t fp16;         // whether scales and zeros of groups are fp16, else bf16
  int32_t parts;   // int8 numbers that stand for an activation: 1, or 3 for fp32's precision
  int32_t swiglu;  // rows of W are gate's and up's, interleaved by 8: the result is SwiGLU (M, N / 2)
  int32_t half;    // whether bias and norm are bf16, else fp32
};

// y = [residual +] W rms_norm(x) [+ bias], or SwiGLU of it, for M rows
struct Product {
  const Linear* layer;
  const void *x, *norm, *residual;  // residual: of x's dtype
  void* y;
  int64_t M;
  float eps;
  int32_t half_x, half_y;
};

// ops/attention.py's attention of S new tokens in each of B rows
struct Attention {
  const void* qkv;
  void *k, *v, *y;
  uint16_t *k_scales, *v_scales;  // bf16 (B, Hkv, T), of caches in 8 bits
  const int64_t* pos;
  const float* rope;  // (turns, rotary / 2, 2) or null
  const void *q_norm, *k_norm;
  int64_t B, S, T, H, Hkv, D, of_row, of_head;  // of_...: between rows and heads of the caches
  int64_t scales_of_row, scales_of_head;
  int64_t turns, rotary, window;
  float eps;
  int32_t kind;    // of the caches: FP32, BF16, INT8 (q + 128), FP8 (e4m3)
  int32_t half_x;  // qkv and y
  int32_t half_norm;
};

struct Layer {
  Linear wqkv, wo, w13, w2;
  const void *attention_norm, *ffn_norm, *q_norm, *k_norm;
  float attention_eps, ffn_eps, head_eps;
  int32_t window, rotates;
};

// All layers of a model: x (B, S, C) to y, both of the model's dtype
struct Step {
  const Layer* layers;
  void* const* caches;  // keys and values of a layer, and the scales of both, or null
  const void* x;
  void* y;
  int64_t n_layer, C;
  int32_t half;  // x and y
  Attention attention;  // what is the same in all layers
};

// The threads that run one function together.
struct Team {
  int32_t threads;
  alignas(64) int64_t next;      // work that nobody has taken yet
  alignas(64) int32_t arrived;   // at the barrier
  alignas(64) uint32_t passed;   // barriers

  int64_t take(int64_t n = 1) { return __atomic_fetch_add(&next, n, __ATOMIC_RELAXED); }
  void wait();  // for all others; then there is new work, from 0 on
};

// Memory of a call: of all threads, and of each one
struct Scratch {
  char *shared, *own;
};

struct Kernels {
  const char* name;
  int32_t lanes;
  int64_t (*linear_scratch)(const Product&, bool shared);
  void (*linear)(const Product&, Team&, Scratch);
  int64_t (*attention_scratch)(const Attention&);
  void (*attention)(const Attention&, Team&, Scratch);
  int64_t (*step_scratch)(const Step&, bool shared);
  void (*step)(const Step&, Team&, Scratch);
};
