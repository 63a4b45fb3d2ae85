// The kernels of a decode step on a CPU, as torch ops; cpu.py says what they compute and how this file is built.
//
// A row of W is read once, 32 bytes at a time, for all rows of x. Such a block is 8 words of 32 bits (or 16 of 16), each
// of P values; the j-th values of all words come out by a shift or two, with no shuffle, if x lies in that order:
// (blocks, P, words). Floating weights meet fp32 activations. int8 and int4 meet 16-bit integers, with a scale for each
// 64 values of x (an error of 2^-16 of the largest of them; fp32 takes two such rows): two products a lane, 16 lanes.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <type_traits>
#include <vector>
#ifdef __AVX2__
#include <immintrin.h>
#endif

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

namespace {

typedef float Floats __attribute__((vector_size(32)));
typedef int32_t Ints __attribute__((vector_size(32)));
typedef int16_t Shorts __attribute__((vector_size(32)));

struct BF16 {
  uint16_t bits;
};

template <class T>
T load(const void* from, size_t bytes = sizeof(T)) {  // zeros beyond `bytes`
  T value = {};
  std::memcpy(&value, from, bytes);
  return value;
}

Floats all(float x) { return Floats{x, x, x, x, x, x, x, x}; }

float widen(float x) { return x; }
float widen(BF16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  return load<float>(&bits);
}

void narrow(float x, float& to) { to = x; }
void narrow(float x, BF16& to) {  // to nearest, ties to even
  uint32_t bits = load<uint32_t>(&x);
  to.bits = std::isnan(x) ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

float sum(Floats v) {
  typedef float Quad __attribute__((vector_size(16)));
  struct Quads {
    Quad low, high;
  } quads = load<Quads>(&v);
  Quad s = quads.low + quads.high;
  return (s[0] + s[2]) + (s[1] + s[3]);
}

Ints multiply(Shorts a, Shorts b) {  // products of neighbours, added in pairs
#ifdef __AVX2__
  return (Ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
  return ((Ints)a << 16 >> 16) * ((Ints)b << 16 >> 16) + ((Ints)a >> 16) * ((Ints)b >> 16);
#endif
}

Floats exp2(Floats x) {  // for x <= 0, to 2^-22; the Taylor series about the nearest integer
  x = x > all(-126) ? x : all(-126);
  Ints whole = __builtin_convertvector(x - 0.5f, Ints);
  Floats f = x - __builtin_convertvector(whole, Floats), y = all(1.5403530e-4f);
  for (float c : {1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.0f}) y = y * f + c;
  return (Floats)((Ints)y + (whole << 23));
}

// --- kinds of weights ------------------------------------------------------------------------------------------------

struct FP32 {
  using Element = float;
  static constexpr int P = 1, WORDS = 8;
  static Floats piece(Ints words, int) { return (Floats)words; }
};
struct Half {  // bf16
  using Element = BF16;
  static constexpr int P = 2, WORDS = 8;
  static Floats piece(Ints words, int j) { return (Floats)(j ? words & -65536 : words << 16); }
};
struct Int8 {
  static constexpr int P = 2, WORDS = 16, BYTES = 64;  // of 64 values
  static void pieces(const char* w, Shorts (&out)[4]) {
    Shorts a = load<Shorts>(w), b = load<Shorts>(w + 32);
    out[0] = a << 8 >> 8, out[1] = a >> 8, out[2] = b << 8 >> 8, out[3] = b >> 8;
  }
};
struct Int4 {
  static constexpr int P = 4, WORDS = 16, BYTES = 32;
  static void pieces(const char* w, Shorts (&out)[4]) {
    Shorts a = load<Shorts>(w);
    for (int j = 0; j < 4; j++) out[j] = a >> 4 * j & 15;
  }
};

// A block of x in the order of a kind's pieces.
template <class Kind, class T, class To>
void arrange(const T* x, To* to) {
  constexpr int P = Kind::P, WORDS = Kind::WORDS;
  for (int j = 0; j < P; j++)
    for (int i = 0; i < WORDS; i++) to[j * WORDS + i] = x[i * P + j];
}

constexpr int64_t padded(int64_t K) { return (K + 63) / 64 * 64; }

// Call f.operator()<M>(first) for runs of n rows that registers hold.
template <class F>
void by_rows(int64_t n, F f) {
  int64_t m = 0;
  for (; m + 8 <= n; m += 8) f.template operator()<8>(m);
  if (m + 6 <= n) f.template operator()<6>(m), m += 6;
  if (m + 4 <= n) f.template operator()<4>(m), m += 4;
  if (m + 2 <= n) f.template operator()<2>(m), m += 2;
  if (m < n) f.template operator()<1>(m);
}

// Rows of x: M of `stride` values, and as the kernels read them, block by block of all rows of a run.
struct Rows {
  int64_t M, K, stride;
  std::vector<float> x;
  std::vector<Floats> blocks;    // for floating weights
  std::vector<Shorts> q;         // for the others
  std::vector<float> scales;     // of 64 values of q
  std::vector<Floats> quarters;  // of sums of 32 values of x, four times each: what int4's zeros are multiplied by
};

// sums[m] += W[n] x[m] for M rows of x, floating weights of `bytes` bytes
template <class Kind, int M>
void dots(const char* w, int64_t bytes, const Floats* x, float* sums) {
  Floats acc[M] = {};
  auto step = [&](Ints words) __attribute__((always_inline)) {
    for (int j = 0; j < Kind::P; j++) {
      if (M > 1 && j == 0) __builtin_prefetch(w + 1024);
      Floats v = Kind::piece(words, j);
      for (int m = 0; m < M; m++) acc[m] += v * x[m * Kind::P + j];
    }
    x += M * Kind::P;
  };
  for (; bytes >= 32; w += 32, bytes -= 32) step(load<Ints>(w));
  if (bytes) step(load<Ints>(w, bytes));
  for (int m = 0; m < M; m++) sums[m] += sum(acc[m]);
}

// Two scales in bf16, the first in four lanes and the second in four.
template <bool PAIRS>
Floats both(const BF16* scales, int64_t i, int shift) {
  uint32_t word = PAIRS ? load<uint32_t>(scales + 2 * i) : scales[2 * i >> shift].bits * 0x10001u;
  return (Floats)((Ints)all(load<float>(&word)) << Ints{16, 16, 16, 16, 0, 0, 0, 0} & -65536);
}

// The same for integer weights. scales and zeros: int4's, of 32 << shift values each; PAIRS: shift is 0.
template <class Kind, int M, bool PAIRS>
void dots(const char* w, int64_t bytes, const Rows& rows, int64_t first, const BF16* scales, const BF16* zeros, int shift,
          float* sums) {
  constexpr bool INT4 = Kind::BYTES == 32;
  const Shorts* q = rows.q.data() + first * (rows.stride / 16);
  const float* q_scales = rows.scales.data() + first * (rows.stride / 64);
  const Floats* quarters = rows.quarters.data() + first * (rows.stride / 64);
  Floats acc[M] = {}, more[M] = {};  // two shorter chains, where there are registers
  auto step = [&](const char* words, Floats scale, Floats zero) __attribute__((always_inline)) {
    if (M > 1) __builtin_prefetch(w + 1024);
    Shorts v[4];
    Kind::pieces(words, v);
    for (int m = 0; m < M; m++, q += 4) {
      Ints y = multiply(v[0], q[0]) + multiply(v[1], q[1]) + (multiply(v[2], q[2]) + multiply(v[3], q[3]));
      Floats q_scale = all(*q_scales++);
      acc[m] += __builtin_convertvector(y, Floats) * (INT4 ? q_scale * scale : q_scale);
      if (INT4) (M > 2 ? acc : more)[m] += zero * *quarters++;
    }
  };
  int64_t block = 0;
  for (; bytes >= Kind::BYTES; block++, w += Kind::BYTES, bytes -= Kind::BYTES) {
    Floats scale = {}, zero = {};
    if (INT4) scale = both<PAIRS>(scales, block, shift), zero = both<PAIRS>(zeros, block, shift) - 8 * scale;
    step(w, scale, zero);
  }
  if (bytes) {
    char last[Kind::BYTES] = {};
    std::memcpy(last, w, bytes);
    Floats scale = {}, zero = {};
    if (INT4) scale = all(widen(scales[2 * block >> shift])), zero = widen(zeros[2 * block >> shift]) - 8 * scale;
    step(last, scale, zero);
  }
  for (int m = 0; m < M; m++) sums[m] += sum(acc[m] + more[m]);
}

template <class T>
const T* data(const Optional& t) {
  return t ? static_cast<const T*>(t->data_ptr()) : nullptr;
}

// --- linear ----------------------------------------------------------------------------------------------------------

template <class T>
void read_rows(Rows& rows, const T* x, const T* norm, double eps) {
  rows.x.resize(rows.M * rows.stride);
  for (int64_t m = 0; m < rows.M; m++) {
    float* to = rows.x.data() + m * rows.stride;
    float squares = 0;
    for (int64_t k = 0; k < rows.K; k++) to[k] = widen(x[m * rows.K + k]), squares += to[k] * to[k];
    if (norm) {
      float gain = 1 / std::sqrt(squares / rows.K + float(eps));
      for (int64_t k = 0; k < rows.K; k++) to[k] *= gain * widen(norm[k]);
    }
    std::fill(to + rows.K, to + rows.stride, 0.0f);
  }
}

// fp32 is worth more than 16 bits: a row becomes two, of multiples of 1/32767 of the largest of 64 values, and the rest.
void split(Rows& rows) {
  const size_t size = rows.x.size();
  rows.M *= 2;
  rows.x.resize(2 * size);
  for (size_t block = 0; block < size; block += 64) {
    float *x = &rows.x[block], *rest = x + size, top = 1e-30f;
    for (int k = 0; k < 64; k++) top = std::max(top, std::fabs(x[k]));
    for (int k = 0; k < 64; k++) {
      float main = std::rint(x[k] * (32767 / top)) * (top / 32767);
      rest[k] = x[k] - main, x[k] = main;
    }
  }
}

template <class Kind>
void arrange_floats(Rows& rows) {
  constexpr int BLOCK = 8 * Kind::P;
  rows.blocks.resize(rows.x.size() / 8);
  float* to = (float*)rows.blocks.data();
  by_rows(rows.M, [&]<int M>(int64_t first) {
    for (int64_t k = 0; k < rows.stride; k += BLOCK)
      for (int m = 0; m < M; m++, to += BLOCK) arrange<Kind>(&rows.x[(first + m) * rows.stride + k], to);
  });
}

template <class Kind>
void arrange_integers(Rows& rows) {
  rows.q.resize(rows.x.size() / 16);
  rows.scales.resize(rows.x.size() / 64);
  rows.quarters.resize(rows.x.size() / 64);
  int64_t block = 0;
  auto add = [&](const float* x) {
    Floats tops = all(1e-30f), halves[2] = {};
    for (int i = 0; i < 8; i++) {
      Floats v = load<Floats>(x + 8 * i), size = (Floats)((Ints)v & 0x7fffffff);
      tops = size > tops ? size : tops;
      halves[i / 4] += v;
    }
    float top = 0;
    for (int i = 0; i < 8; i++) top = std::max(top, tops[i]);
    int32_t rounded[64];
    for (int i = 0; i < 8; i++) {  // 1.5 * 2^23 makes the low bits of a float an integer
      Ints v = (Ints)(load<Floats>(x + 8 * i) * (32767 / top) + 12582912.0f) - 0x4b400000;
      std::memcpy(rounded + 8 * i, &v, sizeof v);
    }
    for (int k = 0; k < 64; k += Kind::P * Kind::WORDS) arrange<Kind>(rounded + k, (int16_t*)&rows.q[4 * block] + k);
    const float low = sum(halves[0]), high = sum(halves[1]);
    rows.scales[block] = std::isnan(low + high) ? low + high : top / 32767;  // integers hold no NaN
    for (int i = 0; i < 8; i++) rows.quarters[block][i] = (i < 4 ? low : high) / 4;
    block++;
  };
  by_rows(rows.M, [&]<int M>(int64_t first) {
    for (int64_t k = 0; k < rows.stride; k += 64)
      for (int m = 0; m < M; m++) add(&rows.x[(first + m) * rows.stride + k]);
  });
}

template <class T>
void store(float y, const T* residual, void* to, int64_t at, bool fp32) {
  if (residual) y += widen(residual[at]);
  if (fp32)
    static_cast<float*>(to)[at] = y;
  else
    narrow(y, static_cast<T*>(to)[at]);
}

// y[i][m] = W[n + i] x[m] for `count` rows of W and all of x, as the kind of weight needs it
template <class Kind>
void products(const char* w, int64_t bytes, const Rows& x, const BF16* s, const BF16* z, int64_t groups, int64_t n,
              int64_t count, float* y) {
  const int shift = groups ? std::countr_zero(uint64_t(2 * bytes / groups / 32)) : 0;
  std::fill_n(y, count * x.M, 0.0f);
  by_rows(x.M, [&]<int M>(int64_t m) {
    if constexpr (Kind::WORDS == 8) {
      // Several rows of x go by parts of K that stay in the first cache, at most 24 KiB.
      const int64_t blocks = (bytes + 31) / 32, parts = M == 1 ? 1 : (blocks * M * Kind::P + 767) / 768;
      const int64_t part = 32 * ((blocks + parts - 1) / parts);
      for (int64_t k = 0; k < bytes; k += part)
        for (int64_t i = 0; i < count; i++)
          dots<Kind, M>(w + (n + i) * bytes + k, std::min(part, bytes - k),
                        &x.blocks[m * (x.stride / 8) + k / 32 * (M * Kind::P)], y + i * x.M + m);
    } else
      for (int64_t i = 0; i < count; i++) {
        const int64_t row = n + i;
        auto f = shift ? dots<Kind, M, false> : dots<Kind, M, true>;
        f(w + row * bytes, bytes, x, m, s + row * groups, z + row * groups, shift, y + i * x.M + m);
      }
  });
  if (Kind::WORDS == 16 && !groups)
    for (int64_t i = 0; i < count; i++)
      for (int64_t m = 0; m < x.M; m++) y[i * x.M + m] *= widen(s[n + i]);
}

template <class T>
Tensor linear(const Tensor& x, const Tensor& weight, const Optional& scales, const Optional& zeros, const Optional& bias,
              const Optional& norm, double eps, const Optional& residual, bool fp32, bool swiglu) {
  thread_local Rows own;
  Rows& rows = own;  // the other threads read this one's
  const int64_t N = weight.size(0), bytes = weight.numel() / N * weight.element_size();
  const int64_t groups = zeros ? zeros->size(1) : 0, K = x.size(-1), all = x.numel() / K;
  rows.K = K, rows.stride = padded(groups ? 2 * bytes : K);
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = swiglu ? N / 2 : N;
  Tensor y = torch::stable::new_empty(x, shape, fp32 ? ScalarType::Float : x.scalar_type());
  const char* w = static_cast<const char*>(weight.data_ptr());
  const BF16 *s = data<BF16>(scales), *z = data<BF16>(zeros);
  const T *b = data<T>(bias), *r = data<T>(residual);
  void* to = y.mutable_data_ptr();
  auto multiply = products<FP32>;
  auto prepare = arrange_floats<FP32>;
  switch (weight.scalar_type()) {
    case ScalarType::BFloat16: multiply = products<Half>, prepare = arrange_floats<Half>; break;
    case ScalarType::Char: multiply = products<Int8>, prepare = arrange_integers<Int8>; break;
    case ScalarType::Byte: multiply = products<Int4>, prepare = arrange_integers<Int4>; break;
    default: break;
  }
  const bool halves = std::is_same_v<T, float> && prepare != arrange_floats<FP32>;
  const int64_t most = halves ? 8 : 16;  // rows of x that stay in the cache
  for (int64_t start = 0; start < all; start += most) {
    const int64_t M = rows.M = std::min(most, all - start);
    read_rows(rows, static_cast<const T*>(x.data_ptr()) + start * K, data<T>(norm), eps);
    if (halves) split(rows);
    prepare(rows);
    torch::stable::parallel_for(0, (N + 15) / 16, 1, [&](int64_t begin, int64_t end) {
      float sums[16 * 16];
      for (int64_t n = 16 * begin; n < std::min(16 * end, N); n += 16) {
        const int64_t count = std::min<int64_t>(16, N - n);
        multiply(w, bytes, rows, s, z, groups, n, count, sums);
        auto value = [&](int64_t m, int64_t i) {
          const float* own = sums + i * rows.M + m;
          return own[0] + (halves ? own[M] : 0) + (b ? widen(b[n + i]) : 0);
        };
        for (int64_t m = 0; m < M; m++) {
          const int64_t row = start + m;
          for (int64_t i = 0; i < (swiglu ? 8 : count); i++) {
            float v = value(m, i);
            if (swiglu) v *= value(m, i + 8) / (1 + std::exp(-v));
            store(v, r, to, swiglu ? (row * N + n) / 2 + i : row * N + n + i, fp32);
          }
        }
      }
    });
  }
  return y;
}

Tensor any_linear(const Tensor x, const Tensor weight, Optional scales, Optional zeros, Optional bias, Optional norm,
                  double eps, Optional residual, bool fp32, bool swiglu) {
  auto f = x.scalar_type() == ScalarType::Float ? linear<float> : linear<BF16>;
  return f(x, weight, scales, zeros, bias, norm, eps, residual, fp32, swiglu);
}

// --- attention -------------------------------------------------------------------------------------------------------

// A head, normalised if asked, rotated at `position` and times `scale`
template <class T>
void turned(const T* head, int64_t D, const T* norm, double eps, const float* rope, int64_t rotary, float scale, float* to) {
  float squares = 0;
  for (int64_t d = 0; d < D; d++) to[d] = widen(head[d]), squares += to[d] * to[d];
  if (norm) {
    float gain = 1 / std::sqrt(squares / D + float(eps));
    for (int64_t d = 0; d < D; d++) to[d] *= gain * widen(norm[d]);
  }
  for (int64_t d = 0; d < rotary; d += 2) {
    float even = to[d], odd = to[d + 1], cos = rope[d], sin = rope[d + 1];
    to[d] = even * cos - odd * sin, to[d + 1] = odd * cos + even * sin;
  }
  for (int64_t d = 0; d < D; d++) to[d] *= scale;
}

template <class Kind, class T = typename Kind::Element>
Tensor attention(const Tensor& qkv, const Tensor& k_cache, const Tensor& v_cache, const Tensor& input_pos,
              const Optional& rope, const Optional& q_norm, const Optional& k_norm, double eps, int64_t H, int64_t window) {
  const int64_t B = qkv.size(0), S = qkv.size(1), Hkv = k_cache.size(1), T_ = k_cache.size(2), D = k_cache.size(3);
  const int64_t of_row = k_cache.stride(0), of_head = k_cache.stride(1);  // values between rows, and between heads
  const int64_t width = (H + 2 * Hkv) * D, blocks = D * sizeof(T) / 32, rotary = rope ? 2 * rope->size(1) : 0;
  const T* in = static_cast<const T*>(qkv.data_ptr());
  const int64_t* pos = static_cast<const int64_t*>(input_pos.data_ptr());
  T *keys = static_cast<T*>(k_cache.mutable_data_ptr()), *values = static_cast<T*>(v_cache.mutable_data_ptr());
  Tensor y = torch::stable::new_empty(qkv, {B, S, H * D});
  T* out = static_cast<T*>(y.mutable_data_ptr());
  auto angles = [&](int64_t position) {
    return rope ? data<float>(rope) + std::min(position, rope->size(0) - 1) * rotary : nullptr;
  };

  std::vector<float> head(D);
  for (int64_t b = 0; b < B; b++)
    for (int64_t s = 0; s < S && pos[b] + s < T_; s++)
      for (int64_t h = 0; h < Hkv; h++) {
        const T* from = in + (b * S + s) * width + (H + h) * D;
        const int64_t at = b * of_row + h * of_head + (pos[b] + s) * D;
        turned(from, D, data<T>(k_norm), eps, angles(pos[b] + s), rotary, 1, head.data());
        for (int64_t d = 0; d < D; d++) narrow(head[d], keys[at + d]);
        std::copy_n(from + Hkv * D, D, values + at);
      }

  torch::stable::parallel_for(0, B * H, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> q(D), p;
    std::vector<Floats> arranged(D / 8);
    std::vector<Floats> acc(blocks * Kind::P);
    for (int64_t task = begin; task < end; task++)
      for (int64_t b = task / H, h = task % H, s = 0; s < S; s++) {
        const int64_t last = pos[b] + s, first = window > 0 ? std::max<int64_t>(0, last - window + 1) : 0;
        const int64_t count = std::max<int64_t>(0, std::min(last + 1, T_) - first);
        const int64_t at = b * of_row + h / (H / Hkv) * of_head + first * D;
        turned(in + (b * S + s) * width + h * D, D, data<T>(q_norm), eps, angles(last), rotary,
               float(1 / (std::sqrt(double(D)) * std::log(2.0))), q.data());
        for (int64_t d = 0; d < D; d += 8 * Kind::P) arrange<Kind>(&q[d], (float*)&arranged[d / 8]);
        p.assign((count + 7) / 8 * 8, 0);
        float top = -std::numeric_limits<float>::infinity();
        for (int64_t t = 0; t < count; t++) {
          dots<Kind, 1>((const char*)(keys + at + t * D), D * sizeof(T), arranged.data(), &p[t]);
          top = std::max(top, p[t]);
        }
        for (int64_t t = 0; t < count; t += 8) {
          Floats e = exp2(load<Floats>(&p[t]) - top);
          std::memcpy(&p[t], &e, sizeof e);
        }
        std::fill(acc.begin(), acc.end(), Floats{});
        float total = 0;
        for (int64_t t = 0; t < count; t++) {
          total += p[t];
          for (int64_t i = 0; i < blocks; i++) {
            Ints words = load<Ints>((const char*)(values + at + t * D) + 32 * i);
            for (int j = 0; j < Kind::P; j++) acc[i * Kind::P + j] += Kind::piece(words, j) * p[t];
          }
        }
        total = total > 0 ? total : 1;  // past a full cache a window may hold nothing
        T* to = out + (b * S + s) * H * D + h * D;
        for (int64_t i = 0; i < blocks; i++)
          for (int j = 0; j < Kind::P; j++)
            for (int l = 0; l < 8; l++) narrow(acc[i * Kind::P + j][l] / total, to[8 * Kind::P * i + l * Kind::P + j]);
      }
  });
  return y;
}

Tensor any_attention(const Tensor qkv, const Tensor k_cache, const Tensor v_cache, const Tensor input_pos, Optional rope,
                  Optional q_norm, Optional k_norm, double eps, int64_t n_head, int64_t window) {
  auto f = qkv.scalar_type() == ScalarType::Float ? attention<FP32> : attention<Half>;
  return f(qkv, k_cache, v_cache, input_pos, rope, q_norm, k_norm, eps, n_head, window);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(gptfast, m) {
  m.def(
      "cpu_linear(Tensor x, Tensor weight, Tensor? scales, Tensor? zeros, Tensor? bias, Tensor? norm, float eps, "
      "Tensor? residual, bool fp32, bool swiglu) -> Tensor");
  m.def(
      "cpu_attention(Tensor qkv, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor input_pos, Tensor? rope, Tensor? q_norm, "
      "Tensor? k_norm, float eps, int n_head, int window) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(gptfast, CPU, m) {
  m.impl("cpu_linear", TORCH_BOX(&any_linear));
  m.impl("cpu_attention", TORCH_BOX(&any_attention));
}
