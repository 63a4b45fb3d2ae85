// A decode step on a CPU, for one instruction set: compiled once for each, with its flags and -DSET=its_name.
//
// A unit of work is 16 rows of W. Integer weights lie in tiles of LANES rows: a vector holds four neighbouring values of
// each row, which meet four activations in every lane (maddubs + madd, vpdpbusd, sdot), so that no row needs a sum over
// lanes. Activations become int8 with a scale for each 32 of them; a few such numbers stand for one where more precision
// is wanted. Floating weights meet fp32 activations, row by row.
//
// Only C headers: an inline function of the standard library, compiled for AVX-512, may be the one that the linker keeps
// for all.

#include "cpu.h"

#include <math.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define INLINE inline __attribute__((always_inline))

namespace {

#if defined(__AVX512BW__)
constexpr int LANES = 16;
#elif defined(__ARM_FEATURE_DOTPROD)
constexpr int LANES = 4;
#else
constexpr int LANES = 8;
#endif
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
constexpr int OFFSET = 128;  // by which int8 weights are too large, as those instructions want one factor unsigned
#else
constexpr int OFFSET = 0;
#endif
constexpr int UNIT = 16, BLOCK = 32;
constexpr int64_t ROWS = 64;  // of x that meet a unit of W while it is in the first cache

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
typedef uint8_t Bytes __attribute__((vector_size(4 * LANES)));
typedef float Floats8 __attribute__((vector_size(32)));
typedef int32_t Ints8 __attribute__((vector_size(32)));
typedef uint32_t Words8 __attribute__((vector_size(32)));
typedef uint16_t Halves8 __attribute__((vector_size(16)));
typedef int8_t Bytes8 __attribute__((vector_size(8)));

template <class T>
INLINE T load(const void* from) {
  T value;
  memcpy(&value, from, sizeof value);
  return value;
}
template <class T>
INLINE T load(const void* from, int64_t bytes) {  // zeros beyond `bytes`
  T value = {};
  memcpy(&value, from, bytes < (int64_t)sizeof value ? bytes : sizeof value);
  return value;
}
template <class T>
INLINE void store(void* to, T value) {
  memcpy(to, &value, sizeof value);
}
INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

INLINE Floats8 widen8(const void* from, int64_t at, bool half) {
  if (!half) return load<Floats8>((const float*)from + at);
  return (Floats8)(__builtin_convertvector(load<Halves8>((const uint16_t*)from + at), Words8) << 16);
}
INLINE float widen(const void* from, int64_t at, bool half) {
  if (!half) return ((const float*)from)[at];
  uint32_t bits = (uint32_t)((const uint16_t*)from)[at] << 16;
  return load<float>(&bits);
}
INLINE uint32_t rounded(uint32_t bits) {  // to bf16, to nearest, ties to even
  return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
INLINE void narrow(float x, void* to, int64_t at, bool half) {
  if (half)
    ((uint16_t*)to)[at] = (uint16_t)rounded(load<uint32_t>(&x));
  else
    ((float*)to)[at] = x;
}
INLINE void narrow8(Floats8 x, void* to, int64_t at, bool half) {
  if (!half) return store((float*)to + at, x);
  Words8 bits = (Words8)x, r = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  r = (bits & 0x7fffffff) > 0x7f800000 ? r * 0 + 0x7fc0 : r;
  store((uint16_t*)to + at, __builtin_convertvector(r, Halves8));
}

template <class V>
INLINE float sum(V v) {  // pairwise
  constexpr int n = sizeof(V) / 8;
  if constexpr (sizeof(V) == 8)
    return v[0] + v[1];
  else {
    typedef float Part __attribute__((vector_size(4 * n)));
    struct {
      Part low, high;
    } parts;
    memcpy(&parts, &v, sizeof v);
    return sum(parts.low + parts.high);
  }
}

INLINE Floats8 exp2_of(Floats8 x) {  // for x <= 0, to 2^-22; the Taylor series about the nearest integer
  x = x > -126.0f ? x : x * 0 - 126.0f;
  Ints8 whole = __builtin_convertvector(x - 0.5f, Ints8);
  Floats8 f = x - __builtin_convertvector(whole, Floats8), y = f * 1.5403530e-4f + 1.3333558e-3f;
  y = y * f + 9.6181291e-3f, y = y * f + 5.5504109e-2f, y = y * f + 2.4022651e-1f, y = y * f + 6.9314718e-1f;
  return (Floats8)((Ints8)(y * f + 1.0f) + (whole << 23));
}
INLINE Floats8 silu(Floats8 x) {
  Floats8 size = (Floats8)((Ints8)x & 0x7fffffff), e = exp2_of(size * -1.4426950f);
  return x * (x < 0 ? e : e * 0 + 1.0f) / (e + 1.0f);
}

// --- activations -----------------------------------------------------------------------------------------------------

struct Block {  // 32 activations: scale * q
  int8_t q[BLOCK];
  float scale, total;  // total: scale * sum
  int32_t start;       // of a sum of integer products, whose weights are too large by a constant
};

INLINE bool is_integer(const Linear& layer) { return layer.kind >= INT8; }

// Bytes of a row of x as the kernels read it
int64_t row_bytes(const Linear& layer) {
  if (is_integer(layer)) return layer.parts * (layer.padded / BLOCK) * (int64_t)sizeof(Block);
  return 4 * up(layer.K, 2 * LANES);
}

// Destroys x; parts of a row lie behind each other. offset: by which weights are too large
void quantize(float* x, int64_t blocks, int parts, int offset, Block* to) {
  for (int64_t b = 0; b < blocks; b++, x += BLOCK)
    for (int part = 0; part < parts; part++) {
      Block& block = to[part * blocks + b];
      Floats8 tops = {}, totals = {};
      for (int i = 0; i < BLOCK; i += 8) {
        Floats8 v = load<Floats8>(x + i), size = (Floats8)((Ints8)v & 0x7fffffff);
        tops = size > tops ? size : tops;
        totals += size;
      }
      float top = 1e-30f;
      for (int i = 0; i < 8; i++) top = tops[i] > top ? tops[i] : top;
      const float scale = top / 127, inverse = 127 / top, check = sum(totals);
      Ints8 sums = {};
      for (int i = 0; i < BLOCK; i += 8) {  // 1.5 * 2^23 makes the low bits of a float an integer
        Floats8 v = load<Floats8>(x + i);
        Ints8 q = (Ints8)(v * inverse + 12582912.0f) - 0x4b400000;
        store(block.q + i, __builtin_convertvector(q, Bytes8));
        if (parts > 1) store(x + i, v - __builtin_convertvector(q, Floats8) * scale);
        sums += q;
      }
      int32_t all = 0;
      for (int i = 0; i < 8; i++) all += sums[i];
      block.start = -offset * all;
      block.scale = check - check == 0 ? scale : NAN;  // integers hold no NaN
      block.total = block.scale * all;
    }
}

// Row m of x, normalised if asked, as the kernels read it. row: fp32 of K, padded by 2 LANES
void prepare(const Product& p, int64_t m, float* row, char* to) {
  const Linear& layer = *p.layer;
  const int64_t K = layer.K, whole = K / 8 * 8, first = m * K;
  Floats8 squares = {};
  float rest = 0;
  for (int64_t k = 0; k < whole; k += 8) {
    Floats8 v = widen8(p.x, first + k, p.half_x);
    store(row + k, v);
    squares += v * v;
  }
  for (int64_t k = whole; k < K; k++) row[k] = widen(p.x, first + k, p.half_x), rest += row[k] * row[k];
  if (p.norm) {
    const float gain = 1 / sqrtf((sum(squares) + rest) / K + p.eps);
    for (int64_t k = 0; k < whole; k += 8)
      store(row + k, load<Floats8>(row + k) * gain * widen8(p.norm, k, layer.half));
    for (int64_t k = whole; k < K; k++) row[k] *= gain * widen(p.norm, k, layer.half);
  }
  const int64_t end = is_integer(layer) ? layer.padded : up(K, 2 * LANES);
  for (int64_t k = K; k < end; k++) row[k] = 0;
  float* out = (float*)to;
  if (is_integer(layer))
    quantize(row, layer.padded / BLOCK, layer.parts, layer.kind == INT4 ? 8 : OFFSET, (Block*)to);
  else if (layer.kind == FP32)
    memcpy(out, row, 4 * end);
  else  // a vector of words of bf16 holds even values, and odd ones
    for (int64_t k = 0; k < end; k += 2 * LANES)
      for (int i = 0; i < LANES; i++) out[k + i] = row[k + 2 * i], out[k + LANES + i] = row[k + 2 * i + 1];
}

// --- integer weights -------------------------------------------------------------------------------------------------

// Four bytes of each lane times four of x, added to acc: weights of 0..15, 32 activations at a time, or any int8 ones.

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
INLINE Ints dot(Ints acc, Bytes w, int32_t x) {
#if defined(__AVX512VNNI__)
  return (Ints)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, _mm512_set1_epi32(x));
#else
  return (Ints)_mm256_dpbusd_avx_epi32((__m256i)acc, (__m256i)w, _mm256_set1_epi32(x));
#endif
}
struct Signed {
  Bytes w;
  INLINE explicit Signed(Bytes bytes) : w(bytes ^ 128) {}
  INLINE Ints dot(Ints acc, int32_t x) const { return ::dot(acc, w, x); }
};
INLINE Ints unsigned_dots(Ints acc, const Bytes (&w)[8], const int8_t* x) {
  for (int i = 0; i < 8; i++) acc = dot(acc, w[i], load<int32_t>(x + 4 * i));
  return acc;
}

#elif defined(__AVX512BW__)
struct Signed {
  __m512i size;
  __mmask64 negative;
  INLINE explicit Signed(Bytes w) : size(_mm512_abs_epi8((__m512i)w)), negative(_mm512_movepi8_mask((__m512i)w)) {}
  INLINE Ints dot(Ints acc, int32_t x) const {
    __m512i all = _mm512_set1_epi32(x), v = _mm512_mask_sub_epi8(all, negative, _mm512_setzero_si512(), all);
    return acc + (Ints)_mm512_madd_epi16(_mm512_maddubs_epi16(size, v), _mm512_set1_epi16(1));
  }
};
INLINE Ints unsigned_dots(Ints acc, const Bytes (&w)[8], const int8_t* x) {
  __m512i y = _mm512_setzero_si512();  // 8 times two products of 15 * 127 fit 16 bits
  for (int i = 0; i < 8; i++)
    y = _mm512_add_epi16(y, _mm512_maddubs_epi16((__m512i)w[i], _mm512_set1_epi32(load<int32_t>(x + 4 * i))));
  return acc + (Ints)_mm512_madd_epi16(y, _mm512_set1_epi16(1));
}

#elif defined(__AVX2__)
struct Signed {
  __m256i w, size;
  INLINE explicit Signed(Bytes bytes) : w((__m256i)bytes), size(_mm256_abs_epi8(w)) {}
  INLINE Ints dot(Ints acc, int32_t x) const {
    __m256i v = _mm256_sign_epi8(_mm256_set1_epi32(x), w);
    return acc + (Ints)_mm256_madd_epi16(_mm256_maddubs_epi16(size, v), _mm256_set1_epi16(1));
  }
};
INLINE Ints unsigned_dots(Ints acc, const Bytes (&w)[8], const int8_t* x) {
  __m256i y = _mm256_setzero_si256();  // 8 times two products of 15 * 127 fit 16 bits
  for (int i = 0; i < 8; i++)
    y = _mm256_add_epi16(y, _mm256_maddubs_epi16((__m256i)w[i], _mm256_set1_epi32(load<int32_t>(x + 4 * i))));
  return acc + (Ints)_mm256_madd_epi16(y, _mm256_set1_epi16(1));
}

#elif defined(__ARM_FEATURE_DOTPROD)
struct Signed {
  Bytes w;
  INLINE explicit Signed(Bytes bytes) : w(bytes) {}
  INLINE Ints dot(Ints acc, int32_t x) const {
    return (Ints)vdotq_s32((int32x4_t)acc, (int8x16_t)w, vreinterpretq_s8_s32(vdupq_n_s32(x)));
  }
};
INLINE Ints unsigned_dots(Ints acc, const Bytes (&w)[8], const int8_t* x) {
  for (int i = 0; i < 8; i++) acc = Signed(w[i]).dot(acc, load<int32_t>(x + 4 * i));
  return acc;
}

#else  // any processor: the compiler makes vectors of it
struct Signed {
  Ints w;
  INLINE explicit Signed(Bytes bytes) : w((Ints)bytes) {}
  INLINE Ints dot(Ints acc, int32_t x) const {
    for (int shift = 0; shift < 32; shift += 8) acc += (w << (24 - shift) >> 24) * ((int32_t)((uint32_t)x << (24 - shift)) >> 24);
    return acc;
  }
};
INLINE Ints unsigned_dots(Ints acc, const Bytes (&w)[8], const int8_t* x) {
  for (int i = 0; i < 8; i++) acc = Signed(w[i]).dot(acc, load<int32_t>(x + 4 * i));
  return acc;
}
#endif

INLINE Floats widened(const uint16_t* from) {
  return (Floats)(__builtin_convertvector(load<Halves>(from), Words) << 16);
}

// A tile times M rows of x, whose blocks are `stride` apart: to y (M, UNIT)
template <int M>
void int4_tile(const Linear& layer, int64_t tile, const Block* x, int64_t stride, float* y) {
  const int64_t groups = layer.padded / layer.group;
  const int inner = layer.group / BLOCK;
  const char* w = (const char*)layer.weight + tile * layer.padded * LANES / 2;
  const uint16_t *s = layer.scales + tile * groups * LANES, *z = layer.zeros + tile * groups * LANES;
  Floats acc[M] = {};
  for (int64_t g = 0; g < groups; g++, s += LANES, z += LANES) {
    const Floats scale = widened(s), zero = widened(z);
    for (int b = 0; b < inner; b++, w += BLOCK / 2 * LANES, x++) {
      for (int i = 0; i < LANES * 16; i += 64) __builtin_prefetch(w + 2048 + i);
      Bytes v[8];
      for (int i = 0; i < 4; i++) {
        Bytes both = load<Bytes>(w + i * sizeof(Bytes));
        v[i] = both & 15, v[i + 4] = (Bytes)((Words)both >> 4) & 15;
      }
      for (int m = 0; m < M; m++) {
        const Block& block = x[m * stride];
        const Ints y = unsigned_dots(Ints{} + block.start, v, block.q);
        acc[m] += zero * block.total;
        acc[m] += __builtin_convertvector(y, Floats) * (scale * block.scale);
      }
    }
  }
  for (int m = 0; m < M; m++) store(y + m * UNIT, acc[m]);
}

template <int M>
void int8_tile(const Linear& layer, int64_t tile, const Block* x, int64_t stride, float* y) {
  const char* w = (const char*)layer.weight + tile * layer.padded * LANES;
  Floats acc[M] = {};
  for (int64_t k = 0; k < layer.padded; k += BLOCK, x++) {
    Ints d[M];
    for (int m = 0; m < M; m++) d[m] = Ints{} + x[m * stride].start;
    for (int i = 0; i < 8; i++, w += sizeof(Bytes)) {
      if (i * sizeof(Bytes) % 64 == 0) __builtin_prefetch(w + 2048);
      const Signed values(load<Bytes>(w));
      for (int m = 0; m < M; m++) d[m] = values.dot(d[m], load<int32_t>(x[m * stride].q + 4 * i));
    }
    for (int m = 0; m < M; m++) acc[m] += __builtin_convertvector(d[m], Floats) * x[m * stride].scale;
  }
  for (int m = 0; m < M; m++) store(y + m * UNIT, acc[m]);
}

// Rows of x that registers hold
template <int M, template <int> class Run, class... Rest>
INLINE void by_rows(int64_t rows, Rest... rest) {
  int64_t m = 0;
  for (; m + M <= rows; m += M) Run<M>::run(m, rest...);
  if (M > 4 && m + 4 <= rows) Run<4>::run(m, rest...), m += 4;
  if (m + 2 <= rows) Run<2>::run(m, rest...), m += 2;
  if (m < rows) Run<1>::run(m, rest...);
}

template <int M>
struct Int4Tiles {
  static INLINE void run(int64_t m, const Linear& layer, int64_t unit, const Block* x, int64_t stride, float* y) {
    for (int t = 0; t < UNIT / LANES; t++)
      int4_tile<M>(layer, unit * (UNIT / LANES) + t, x + m * stride, stride, y + m * UNIT + t * LANES);
  }
};
template <int M>
struct Int8Tiles {
  static INLINE void run(int64_t m, const Linear& layer, int64_t unit, const Block* x, int64_t stride, float* y) {
    for (int t = 0; t < UNIT / LANES; t++)
      int8_tile<M>(layer, unit * (UNIT / LANES) + t, x + m * stride, stride, y + m * UNIT + t * LANES);
  }
};

// --- floating weights ------------------------------------------------------------------------------------------------

// y[m][r] = W[r] x[m] for R rows of W of `bytes` bytes and M of x, `stride` floats apart
template <bool HALF, int R, int M>
void dots(const char* w, int64_t bytes, const float* x, int64_t stride, float* y) {
  Floats acc[M][R] = {};
  auto step = [&](int64_t at, auto words) __attribute__((always_inline)) {
    Words v[R];
    for (int r = 0; r < R; r++) v[r] = words(w + r * bytes + at);
    for (int m = 0; m < M; m++) {
      const float* own = x + m * stride + (HALF ? at / 2 : at / 4);
      const Floats a = load<Floats>(own);
      for (int r = 0; r < R; r++) acc[m][r] += (Floats)(HALF ? v[r] << 16 : v[r]) * a;
      if (HALF) {
        const Floats b = load<Floats>(own + LANES);
        for (int r = 0; r < R; r++) acc[m][r] += (Floats)(v[r] & 0xffff0000) * b;
      }
    }
  };
  int64_t at = 0;
  for (; at + 64 <= bytes; at += 64) {
    for (int r = 0; r < R; r++) __builtin_prefetch(w + (r + R) * bytes + at);
    for (int i = 0; i < 64; i += sizeof(Words)) step(at + i, [](const char* p) { return load<Words>(p); });
  }
  for (; at < bytes; at += sizeof(Words)) step(at, [&](const char* p) { return load<Words>(p, bytes - at); });
  for (int m = 0; m < M; m++)
    for (int r = 0; r < R; r++) y[m * UNIT + r] = sum(acc[m][r]);
}

template <bool HALF, int M>
INLINE void rows_of(const char* w, int64_t bytes, int64_t count, const float* x, int64_t stride, float* y) {
  constexpr int R = M <= 2 ? 4 : 2;
  int64_t r = 0;
  for (; r + R <= count; r += R) dots<HALF, R, M>(w + r * bytes, bytes, x, stride, y + r);
  for (; r < count; r++) dots<HALF, 1, M>(w + r * bytes, bytes, x, stride, y + r);
}
template <int M>
struct HalfRows {
  static INLINE void run(int64_t m, const char* w, int64_t bytes, int64_t count, const float* x, int64_t stride, float* y) {
    rows_of<true, M>(w, bytes, count, x + m * stride, stride, y + m * UNIT);
  }
};
template <int M>
struct FloatRows {
  static INLINE void run(int64_t m, const char* w, int64_t bytes, int64_t count, const float* x, int64_t stride, float* y) {
    rows_of<false, M>(w, bytes, count, x + m * stride, stride, y + m * UNIT);
  }
};

// --- linear ----------------------------------------------------------------------------------------------------------

// A unit of rows of W times `rows` rows of x: to y (rows, UNIT)
void products(const Linear& layer, int64_t unit, int64_t rows, const char* x, float* y) {
  if (is_integer(layer)) {
    const int64_t stride = layer.padded / BLOCK;
    if (layer.kind == INT4)
      by_rows<4, Int4Tiles>(rows * layer.parts, layer, unit, (const Block*)x, stride, y);
    else
      by_rows<4, Int8Tiles>(rows * layer.parts, layer, unit, (const Block*)x, stride, y);
    for (int64_t m = 0; layer.parts > 1 && m < rows; m++)
      for (int i = 0; i < UNIT; i++) {
        float all = 0;
        for (int part = layer.parts; part--;) all += y[(m * layer.parts + part) * UNIT + i];
        y[m * UNIT + i] = all;
      }
    return;
  }
  const int64_t bytes = layer.K * (layer.kind == BF16 ? 2 : 4), count = least(UNIT, layer.N - unit * UNIT);
  const char* w = (const char*)layer.weight + unit * UNIT * bytes;
  if (layer.kind == BF16)
    by_rows<6, HalfRows>(rows, w, bytes, count, (const float*)x, row_bytes(layer) / 4, y);
  else
    by_rows<6, FloatRows>(rows, w, bytes, count, (const float*)x, row_bytes(layer) / 4, y);
}

// What becomes of a unit's products of a row
void finish(const Product& p, int64_t unit, int64_t m, float* y) {
  const Linear& layer = *p.layer;
  const int64_t n = unit * UNIT, count = least(UNIT, layer.N - n), width = layer.swiglu ? layer.N / 2 : layer.N;
  if (layer.kind == INT8)
    for (int i = 0; i < count; i++) y[i] *= widen(layer.scales, n + i, true);
  if (layer.bias)
    for (int i = 0; i < count; i++) y[i] += widen(layer.bias, n + i, layer.half);
  const int64_t at = m * width + (layer.swiglu ? n / 2 : n), end = layer.swiglu ? 8 : count;
  if (layer.swiglu) store(y, silu(load<Floats8>(y)) * load<Floats8>(y + 8));
  for (int64_t i = 0; i < end; i += 8)
    if (i + 8 <= end) {
      Floats8 v = load<Floats8>(y + i);
      narrow8(p.residual ? v + widen8(p.residual, at + i, p.half_x) : v, p.y, at + i, p.half_y);
    } else
      for (int64_t j = i; j < end; j++)
        narrow(p.residual ? y[j] + widen(p.residual, at + j, p.half_x) : y[j], p.y, at + j, p.half_y);
}

int64_t linear_scratch(const Product& p, bool shared) {
  const int64_t row = row_bytes(*p.layer);
  return up(shared ? p.M * row : row + 4 * (p.layer->padded + 2 * LANES), 64);
}

void linear(const Product& p, Team& team, Scratch scratch) {
  const Linear& layer = *p.layer;
  const int64_t row = row_bytes(layer);
  char* rows = scratch.shared;
  float* wide = (float*)(scratch.own + up(row, 64));
  if (p.M == 1)  // sooner done by each thread than waited for
    prepare(p, 0, wide, rows = scratch.own);
  else {
    for (int64_t m; (m = team.take()) < p.M;) prepare(p, m, wide, rows + m * row);
    team.wait();
  }
  const int64_t units = (layer.N + UNIT - 1) / UNIT, chunk = most(1, units / (8 * team.threads));
  const int64_t chunks = (units + chunk - 1) / chunk, few = most(1, ROWS / layer.parts);
  float y[ROWS * UNIT];
  for (int64_t task; (task = team.take()) < chunks * ((p.M + few - 1) / few);) {
    const int64_t first = task / chunks * few, count = least(few, p.M - first), begin = task % chunks * chunk;
    for (int64_t unit = begin; unit < least(begin + chunk, units); unit++) {
      products(layer, unit, count, rows + first * row, y);
      for (int64_t m = 0; m < count; m++) finish(p, unit, first + m, y + m * UNIT);
    }
  }
  team.wait();
}

// --- attention -------------------------------------------------------------------------------------------------------

// A head, normalised if asked and rotated at `position`
void turned(const Attention& a, int64_t at, const void* norm, int64_t position, float* to) {
  Floats8 squares = {};
  for (int64_t d = 0; d < a.D; d += 8) {
    Floats8 v = widen8(a.qkv, at + d, a.half_x);
    store(to + d, v);
    squares += v * v;
  }
  if (norm) {
    const float gain = 1 / sqrtf(sum(squares) / a.D + a.eps);
    for (int64_t d = 0; d < a.D; d += 8) store(to + d, load<Floats8>(to + d) * gain * widen8(norm, d, a.half_norm));
  }
  if (!a.rope) return;
  const float* rope = a.rope + least(position, a.turns - 1) * a.rotary;
  for (int64_t d = 0; d < a.rotary; d += 2) {
    float even = to[d], odd = to[d + 1], cos = rope[d], sin = rope[d + 1];
    to[d] = even * cos - odd * sin, to[d + 1] = odd * cos + even * sin;
  }
}

// Keys and values of row b's token s and key head h, into the caches
void write_cache(const Attention& a, int64_t b, int64_t s, int64_t h, float* head) {
  const int64_t position = a.pos[b] + s, at = b * a.of_row + h * a.of_head + position * a.D;
  const int64_t from = (b * a.S + s) * (a.H + 2 * a.Hkv) * a.D + (a.H + h) * a.D;
  if (position >= a.T) return;
  turned(a, from, a.k_norm, position, head);
  for (int64_t d = 0; d < a.D; d += 8) narrow8(load<Floats8>(head + d), a.k, at + d, a.half);
  for (int64_t d = 0; d < a.D; d += 8) narrow8(widen8(a.qkv, from + a.Hkv * a.D + d, a.half_x), a.v, at + d, a.half);
}

int64_t attention_scratch(const Attention& a) { return up(4 * (up(a.T, 8) + 3 * a.D), 64); }

// Query head h of row b's token s. D8: of D / 8, or 0
template <bool HALF, int D8>
void attend(const Attention& a, int64_t b, int64_t s, int64_t h, float* scratch) {
  const int64_t D = D8 ? 8 * D8 : a.D, last = a.pos[b] + s, size = HALF ? 2 : 4;
  const int64_t first = a.window > 0 ? most(0, last - a.window + 1) : 0, count = most(0, least(last + 1, a.T) - first);
  const int64_t at = b * a.of_row + h / (a.H / a.Hkv) * a.of_head + first * D;
  const char *keys = (const char*)a.k + at * size, *values = (const char*)a.v + at * size;
  float *q = scratch, *acc = q + D, *p = acc + 2 * D;
  turned(a, ((b * a.S + s) * (a.H + 2 * a.Hkv) + h) * D, a.q_norm, last, q);
  const float scale = (float)(1 / (sqrt((double)D) * 0.6931471805599453));
  for (int64_t d = 0; d < D; d++) q[d] *= scale;
  float top = -INFINITY;
  for (int64_t t = 0; t < count; t++) {
    Floats8 y = {};
    for (int64_t d = 0; d < D; d += 8) y += widen8(keys + t * D * size, d, HALF) * load<Floats8>(q + d);
    p[t] = sum(y);
    top = p[t] > top ? p[t] : top;
  }
  for (int64_t t = count; t < up(count, 8); t++) p[t] = -INFINITY;
  Floats8 totals = {};
  for (int64_t t = 0; t < count; t += 8) {
    Floats8 raw = load<Floats8>(p + t), e = exp2_of(raw - top);
    e = raw > -INFINITY ? e : raw != raw ? raw : e * 0;
    store(p + t, e);
    totals += e;
  }
  float total = sum(totals);
  total = total > 0 || total != total ? total : 1;  // past a full cache a window may hold nothing
  const int64_t out = (b * a.S + s) * a.H * D + h * D;
  if constexpr (D8 > 0) {
    Floats8 y[D8] = {};
    for (int64_t t = 0; t < count; t++)
      for (int d = 0; d < D8; d++) y[d] += widen8(values + t * D * size, 8 * d, HALF) * p[t];
    for (int d = 0; d < D8; d++) narrow8(y[d] / total, a.y, out + 8 * d, a.half_x);
  } else
    for (int64_t d = 0; d < D; d += 8) {
      Floats8 y = {};
      for (int64_t t = 0; t < count; t++) y += widen8(values + t * D * size, d, HALF) * p[t];
      narrow8(y / total, a.y, out + d, a.half_x);
    }
}

void attention(const Attention& a, Team& team, Scratch scratch) {
  float* own = (float*)scratch.own;
  for (int64_t task; (task = team.take()) < a.B * a.S * a.Hkv;)
    write_cache(a, task / a.Hkv / a.S, task / a.Hkv % a.S, task % a.Hkv, own);
  team.wait();
  auto run = a.D == 64 ? a.half ? attend<true, 8> : attend<false, 8> : a.half ? attend<true, 0> : attend<false, 0>;
  for (int64_t task; (task = team.take()) < a.B * a.H * a.S;) run(a, task / a.H / a.S, task / a.H % a.S, task % a.H, own);
  team.wait();
}

// --- all layers ------------------------------------------------------------------------------------------------------

struct Buffers {  // fp32
  int64_t x, qkv, y, hidden, rows;
};

// The most that a linear layer of a step needs
int64_t most_scratch(const Step& step, bool shared) {
  int64_t bytes = 0;
  for (int64_t i = 0; i < step.n_layer; i++) {
    const Layer& l = step.layers[i];
    for (const Linear* layer : (const Linear* const[]){&l.wqkv, &l.wo, &l.w13, &l.w2})
      bytes = most(bytes, linear_scratch({layer, 0, 0, 0, 0, step.attention.B * step.attention.S, 0, 0, 0}, shared));
  }
  return bytes;
}

Buffers buffers(const Step& step) {
  const Attention& a = step.attention;
  const int64_t M = a.B * a.S;
  Buffers b = {};
  b.qkv = b.x + up(4 * M * step.C, 64);
  b.y = b.qkv + up(4 * M * (a.H + 2 * a.Hkv) * a.D, 64);
  b.hidden = b.y + up(4 * M * a.H * a.D, 64);
  b.rows = b.hidden + up(2 * M * step.layers[0].w13.N, 64);
  return b;
}

int64_t step_scratch(const Step& step, bool shared) {
  const int64_t linears = most_scratch(step, shared);
  return shared ? buffers(step).rows + linears : most(attention_scratch(step.attention), linears);
}

void step(const Step& step, Team& team, Scratch scratch) {
  const Buffers at = buffers(step);
  const int64_t M = step.attention.B * step.attention.S;
  char *qkv = scratch.shared + at.qkv, *y = scratch.shared + at.y, *hidden = scratch.shared + at.hidden;
  float* x = (float*)scratch.shared;
  const Scratch rest = {scratch.shared + at.rows, scratch.own};
  for (int64_t i = 0; i < step.n_layer; i++) {
    const Layer& l = step.layers[i];
    const bool first = i == 0, last = i + 1 == step.n_layer;  // between them x is fp32
    const bool half = step.attention.half;
    Attention a = step.attention;
    a.qkv = qkv, a.y = y, a.k = step.caches[2 * i], a.v = step.caches[2 * i + 1];
    a.rope = l.rotates ? a.rope : nullptr, a.window = l.window;
    a.q_norm = l.q_norm, a.k_norm = l.k_norm, a.eps = l.head_eps;
    if (first) {
      for (int64_t m; (m = team.take()) < M;)
        for (int64_t c = 0; c < step.C; c++) x[m * step.C + c] = widen(step.x, m * step.C + c, half);
      team.wait();
    }
    linear({&l.wqkv, x, l.attention_norm, nullptr, qkv, M, l.attention_eps, 0, 0}, team, rest);
    attention(a, team, rest);
    linear({&l.wo, y, nullptr, x, x, M, 0, 0, 0}, team, rest);
    linear({&l.w13, x, l.ffn_norm, nullptr, hidden, M, l.ffn_eps, 0, 0}, team, rest);
    linear({&l.w2, hidden, nullptr, x, last ? step.y : x, M, 0, 0, last && half}, team, rest);
  }
}

}  // namespace

#define NAME_OF(set) #set
#define TABLE_OF(set) gptfast_##set
#define NAME(set) NAME_OF(set)
#define TABLE(set) TABLE_OF(set)

extern "C" __attribute__((visibility("default"))) const Kernels TABLE(SET);
const Kernels TABLE(SET) = {NAME(SET),         LANES,     linear_scratch, linear,
                            attention_scratch, attention, step_scratch,   step};
