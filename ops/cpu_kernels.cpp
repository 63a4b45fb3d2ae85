// A decode step on a CPU, for one instruction set: compiled once for each, with its flags and -DSET=its_name.
//
// A unit of work is 16 rows of W. Integer weights lie in tiles of LANES rows: a vector holds four neighbouring values of
// each row, which meet four activations in every lane (maddubs + madd, vpdpbusd, sdot), so that no row needs a sum over
// lanes. Activations become int8 with a scale for each 32 of them; a few such numbers stand for one where more precision
// is wanted. Floating weights meet fp32 activations, row by row, or bf16 where the processor multiplies that. Many rows of
// x meet panels: what a unit stands for in fp32, so that widening is paid once for all of them, or bf16 as it is.
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
constexpr int AHEAD = 2048;       // bytes of weights that are asked for
constexpr int DOTS_AHEAD = 8192;  // the same of floating weights where several rows of x are loaded between them
constexpr int64_t ROWS = 64;         // of x that meet a unit of W while it is in the first cache
constexpr int64_t PANEL_ROWS = 192;  // as many that meet a panel, if they fit the second cache
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__) || defined(__ARM_FEATURE_DOTPROD)
constexpr bool FAST_INTEGERS = true;  // more products an instruction than of floats
#else
constexpr bool FAST_INTEGERS = false;
#endif
#if defined(__AVX512BF16__)
constexpr bool FAST_HALVES = true;  // twice as many products of bf16 an instruction as of fp32
#else
constexpr bool FAST_HALVES = false;
#endif

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

// What lies ahead of `from`, into a cache beyond the first: into the first it would take the place of loads.
INLINE void prefetch(const char* from) { __builtin_prefetch(from + AHEAD, 0, 1); }

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
  float first_total;   // as these, of the first 16
  int32_t first_start;
};

INLINE bool is_integer(const Linear& layer) { return layer.kind >= INT8; }

// Whether x is rounded to bf16. Fewer rows wait for memory: there fp32 costs little.
INLINE bool by_halves(const Product& p) { return FAST_HALVES && p.layer->kind == BF16 && p.M >= 4; }
INLINE bool by_panels(const Product& p) { return p.M >= 32 && !(FAST_INTEGERS && is_integer(*p.layer)); }

// Words of a row of x: of two values in bf16, or of one in fp32
INLINE int64_t panel_words(const Product& p) { return by_halves(p) ? (p.layer->K + 1) / 2 : p.layer->K; }

// Bytes of a row of x as the kernels read it
int64_t row_bytes(const Product& p) {
  const Linear& layer = *p.layer;
  if (is_integer(layer) && !by_panels(p)) return layer.parts * (layer.padded / BLOCK) * (int64_t)sizeof(Block);
  return 4 * up(by_halves(p) ? panel_words(p) : layer.K, 2 * LANES);
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
      Ints8 sums[2] = {};
      for (int i = 0; i < BLOCK; i += 8) {  // 1.5 * 2^23 makes the low bits of a float an integer
        Floats8 v = load<Floats8>(x + i);
        Ints8 q = (Ints8)(v * inverse + 12582912.0f) - 0x4b400000;
        store(block.q + i, __builtin_convertvector(q, Bytes8));
        if (parts > 1) store(x + i, v - __builtin_convertvector(q, Floats8) * scale);
        sums[i / 16] += q;
      }
      int32_t first = 0, all = 0;
      for (int i = 0; i < 8; i++) first += sums[0][i], all += sums[0][i] + sums[1][i];
      block.start = -offset * all, block.first_start = -offset * first;
      block.scale = check - check == 0 ? scale : NAN;  // integers hold no NaN
      block.total = block.scale * all, block.first_total = block.scale * first;
    }
}

// Row m of x, normalised if asked, as the kernels read it. row: fp32 of K, padded by 2 LANES
void prepare(const Product& p, int64_t m, float* row, char* to) {
  const Linear& layer = *p.layer;
  const bool halves = by_halves(p);
  if (by_panels(p) && !halves) row = (float*)to;
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
  if (halves) {
    for (int64_t k = K; k < up(K, 32); k++) row[k] = 0;
    for (int64_t k = 0; k < up(K, 32); k += 8) narrow8(load<Floats8>(row + k), to, k, true);
  }
  if (halves || by_panels(p)) return;
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

INLINE Floats widened(const uint16_t* from, bool fp16) {
#if defined(__AVX512BW__)
  if (fp16) return (Floats)_mm512_cvtph_ps(load<__m256i>(from));
#endif
  const Words v = __builtin_convertvector(load<Halves>(from), Words) << 16;
  // The sign's copies are taken from above the exponent, whose bias is 112 less than that of fp32.
  return fp16 ? (Floats)((Ints)v >> 3 & (int32_t)0x8fffffff) * 0x1p112f : (Floats)v;
}

// A tile times M rows of x, whose blocks are `stride` apart: to y (M, UNIT)
template <int M, bool FP16>
void int4_tile(const Linear& layer, int64_t tile, const Block* x, int64_t stride, float* y) {
  const int64_t groups = layer.padded / layer.group;
  const int inner = layer.group / BLOCK;
  const char* w = (const char*)layer.weight + tile * layer.padded * LANES / 2;
  const uint16_t *s = (const uint16_t*)layer.scales + tile * groups * LANES, *z = layer.zeros + tile * groups * LANES;
  Floats acc[M] = {};
  for (int64_t g = 0; g < groups; g++, s += LANES, z += LANES) {
    const Floats scale = widened(s, FP16), zero = widened(z, FP16);
    for (int b = 0; b < inner; b++, w += BLOCK / 2 * LANES, x++) {
      for (int i = 0; i < LANES * 16; i += 64) prefetch(w + i);
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
      if (i * sizeof(Bytes) % 64 == 0) prefetch(w);
      const Signed values(load<Bytes>(w));
      for (int m = 0; m < M; m++) d[m] = values.dot(d[m], load<int32_t>(x[m * stride].q + 4 * i));
    }
    for (int m = 0; m < M; m++) acc[m] += __builtin_convertvector(d[m], Floats) * x[m * stride].scale;
  }
  for (int m = 0; m < M; m++) store(y + m * UNIT, acc[m]);
}

// int8_tile of groups. HALVES: 2 where a block of x meets two of them
template <int M, bool FP16, int HALVES>
void int8_groups_tile(const Linear& layer, int64_t tile, const Block* x, int64_t stride, float* y) {
  const int64_t groups = layer.padded / layer.group;
  const int inner = HALVES == 2 ? 1 : layer.group / BLOCK;
  const char* w = (const char*)layer.weight + tile * layer.padded * LANES;
  const uint16_t* s = (const uint16_t*)layer.scales + tile * groups * LANES;
  const uint16_t* z = layer.zeros ? layer.zeros + tile * groups * LANES : nullptr;
  Floats acc[M] = {};
  for (int64_t g = 0; g < groups; g += HALVES, s += HALVES * LANES) {
    Floats scale[HALVES], zero[HALVES] = {};
    for (int h = 0; h < HALVES; h++) {
      scale[h] = widened(s + h * LANES, FP16);
      if (z) zero[h] = widened(z, FP16), z += LANES;
    }
    for (int b = 0; b < inner; b++, x++) {
      Ints d[M][HALVES];
      for (int m = 0; m < M; m++) {
        const Block& block = x[m * stride];
        d[m][0] = Ints{} + (HALVES == 2 ? block.first_start : block.start);
        if (HALVES == 2) d[m][HALVES - 1] = Ints{} + (block.start - block.first_start);
      }
      for (int i = 0; i < 8; i++, w += sizeof(Bytes)) {
        if (i * sizeof(Bytes) % 64 == 0) prefetch(w);
        const Signed values(load<Bytes>(w));
        for (int m = 0; m < M; m++) {
          Ints& own = d[m][i * HALVES / 8];
          own = values.dot(own, load<int32_t>(x[m * stride].q + 4 * i));
        }
      }
      for (int m = 0; m < M; m++) {
        const Block& block = x[m * stride];
        for (int h = 0; h < HALVES; h++)
          acc[m] += __builtin_convertvector(d[m][h], Floats) * (scale[h] * block.scale);
        if (!z) continue;
        acc[m] += zero[0] * (HALVES == 2 ? block.first_total : block.total);
        if (HALVES == 2) acc[m] += zero[HALVES - 1] * (block.total - block.first_total);
      }
    }
  }
  for (int m = 0; m < M; m++) store(y + m * UNIT, acc[m]);
}

// Rows of x, as many at a time as registers hold. The last ones go by halves of that number, or, at the price of more
// code, AT_ONCE.
template <int M, template <int> class Run, bool AT_ONCE = false, class... Rest>
INLINE void by_rows(int64_t m, int64_t rows, Rest... rest) {
  for (; m + M <= rows; m += M) Run<M>::run(m, rest...);
  if constexpr (M > 1) by_rows<AT_ONCE ? M - 1 : M / 2, Run, AT_ONCE>(m, rows, rest...);
}

template <int M>
struct Int4Tiles {
  static INLINE void run(int64_t m, const Linear& layer, int64_t unit, const Block* x, int64_t stride, float* y) {
    const auto tile = layer.fp16 ? int4_tile<M, true> : int4_tile<M, false>;
    for (int t = 0; t < UNIT / LANES; t++)
      tile(layer, unit * (UNIT / LANES) + t, x + m * stride, stride, y + m * UNIT + t * LANES);
  }
};
template <int M>
struct Int8Tiles {
  static INLINE void run(int64_t m, const Linear& layer, int64_t unit, const Block* x, int64_t stride, float* y) {
    const auto groups = layer.fp16 ? layer.group < BLOCK ? int8_groups_tile<M, true, 2> : int8_groups_tile<M, true, 1>
                                   : layer.group < BLOCK ? int8_groups_tile<M, false, 2> : int8_groups_tile<M, false, 1>;
    const auto tile = layer.group ? groups : int8_tile<M>;
    for (int t = 0; t < UNIT / LANES; t++)
      tile(layer, unit * (UNIT / LANES) + t, x + m * stride, stride, y + m * UNIT + t * LANES);
  }
};

// --- floating weights ------------------------------------------------------------------------------------------------

#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Words8{__VA_ARGS__})
#endif

INLINE void transpose(Words8 (&v)[8]) {
  Words8 a[8], b[8];
  for (int i = 0; i < 8; i += 2) {
    a[i] = SHUFFLE(v[i], v[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    a[i + 1] = SHUFFLE(v[i], v[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; j++) {
      b[i + 2 * j] = SHUFFLE(a[i + j], a[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      b[i + 2 * j + 1] = SHUFFLE(a[i + j], a[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  for (int i = 0; i < 4; i++) {
    v[i] = SHUFFLE(b[i], b[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    v[i + 4] = SHUFFLE(b[i], b[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
}

// acc + w x in each lane, of an fp32 or of two bf16
template <bool HALVES>
INLINE Floats multiply_add(Floats acc, Floats w, Floats x) {
#if defined(__AVX512BF16__)
  if constexpr (HALVES) return (Floats)_mm512_dpbf16_ps((__m512)acc, (__m512bh)w, (__m512bh)x);
#endif
  return acc + w * x;
}

// y[m] = w x[m] for a row of W of `bytes` bytes and M of x, `stride` floats apart. A processor prefetches one stream of
// memory by itself, fastest; loads of several rows of x confuse it.
template <bool HALF, int M>
void dots(const char* w, int64_t bytes, const float* x, int64_t stride, float* y) {
  constexpr int WIDTH = HALF ? 2 : 1, CHAINS = M == 1 ? 64 / sizeof(Words) * WIDTH : WIDTH;
  Floats acc[M][CHAINS] = {};
  auto step = [&](int64_t at, int chain, Words v) __attribute__((always_inline)) {
    for (int m = 0; m < M; m++) {
      const float* own = x + m * stride + at * WIDTH / 4;
      acc[m][chain] += (Floats)(HALF ? v << 16 : v) * load<Floats>(own);
      if (HALF) acc[m][chain + WIDTH - 1] += (Floats)(v & 0xffff0000) * load<Floats>(own + LANES);
    }
  };
  int64_t at = 0;
  for (; at + 64 <= bytes; at += 64) {
    if (M > 1) __builtin_prefetch(w + at + DOTS_AHEAD, 0, 1);
    for (int64_t i = 0; i < 64; i += sizeof(Words))
      step(at + i, i / sizeof(Words) * WIDTH % CHAINS, load<Words>(w + at + i));
  }
  for (; at < bytes; at += sizeof(Words)) step(at, 0, load<Words>(w + at, bytes - at));
  for (int m = 0; m < M; m++) {
    for (int i = 1; i < CHAINS; i++) acc[m][0] += acc[m][i];
    y[m * UNIT] = sum(acc[m][0]);
  }
}

#if defined(__AVX512BF16__)
// The sum of the lanes of each
template <int M>
INLINE Floats8 sums(const Floats (&acc)[M]) {
  Words8 v[8] = {};
  for (int m = 0; m < M; m++) {
    const __m512 own = (__m512)acc[m];
    v[m] = (Words8)(_mm512_castps512_ps256(own) + _mm512_extractf32x8_ps(own, 1));
  }
  transpose(v);
  Floats8 s[8];
  for (int i = 0; i < 8; i++) s[i] = (Floats8)v[i];
  return s[0] + s[1] + (s[2] + s[3]) + (s[4] + s[5] + (s[6] + s[7]));
}

// The same of R rows of W and x in bf16, to y[r] of floats. A vector of x that is loaded meets R of W: more loads than
// products would take longer than these. ahead: what is to be read later, R rows as well, or null
template <int M, int R>
void half_dots(const char* w, int64_t bytes, const char* ahead, const char* x, int64_t stride, Words8* y) {
  Floats acc[R][M] = {};
  auto step = [&](int64_t at, const Floats (&v)[R]) __attribute__((always_inline)) {
    for (int m = 0; m < M; m++) {
      const Floats own = load<Floats>(x + m * stride + at);
      for (int r = 0; r < R; r++) acc[r][m] = multiply_add<true>(acc[r][m], v[r], own);
    }
  };
  int64_t at = 0;
  for (; at + 64 <= bytes; at += 64) {
    Floats v[R];
    for (int r = 0; r < R; r++) {
      if (ahead) __builtin_prefetch(ahead + R * at + 64 * r, 0, 1);
      v[r] = load<Floats>(w + r * bytes + at);
    }
    step(at, v);
  }
  if (at < bytes) {
    Floats v[R];
    for (int r = 0; r < R; r++) v[r] = load<Floats>(w + r * bytes + at, bytes - at);
    step(at, v);
  }
  for (int r = 0; r < R; r++) y[r] = (Words8)sums(acc[r]);
}

// `count` rows of W times M rows of x. next: the unit that is read after this one, or null
template <int M>
void half_unit(const char* w, int64_t bytes, int64_t count, const char* next, const char* x, int64_t stride, float* y) {
  const int64_t ahead = least(UNIT, up((DOTS_AHEAD + bytes - 1) / bytes, 2));  // rows
  for (int64_t first = 0; first < UNIT; first += 8) {
    Words8 part[8] = {};  // of floats
    for (int64_t r = first; r < least(first + 8, count); r += 2) {
      const int64_t later = r + ahead;
      const char* there = !next ? nullptr : later < UNIT ? w + later * bytes : next + (later - UNIT) * bytes;
      const auto run = r + 1 < count ? half_dots<M, 2> : half_dots<M, 1>;
      run(w + r * bytes, bytes, there, x, stride, part + r - first);
    }
    transpose(part);
    for (int m = 0; m < M; m++) store(y + m * UNIT + first, part[m]);
  }
}
template <int M>
struct HalfUnits {
  static INLINE void run(int64_t m, const char* w, int64_t bytes, int64_t count, const char* next, const char* x,
                         int64_t stride, float* y) {
    half_unit<M>(w, bytes, count, m ? nullptr : next, x + m * stride, stride, y + m * UNIT);
  }
};
#endif

template <bool HALF>
struct Rows {
  template <int M>
  struct Dots {
    static INLINE void run(int64_t m, const char* w, int64_t bytes, int64_t count, const float* x, int64_t stride,
                           float* y) {
      for (int64_t r = 0; r < count; r++) dots<HALF, M>(w + r * bytes, bytes, x + m * stride, stride, y + m * UNIT + r);
    }
  };
};

// --- panels ----------------------------------------------------------------------------------------------------------

// `count` of 16 rows of `bytes` bytes, one behind the other, as a panel (values of a row, UNIT) of bf16 in
// fp32, or (words of a row, UNIT) as they are; zeros for the others
template <bool HALF>
void rows_panel(const char* rows, int64_t bytes, int64_t count, float* panel) {
  for (int r = 0; r < UNIT; r += 8)
    for (int64_t at = 0; at < bytes; at += 32) {
      Words8 v[8] = {};
      for (int i = 0; i < 8 && r + i < count; i++) {
        const char* from = rows + (r + i) * bytes + at;
        v[i] = at + 32 <= bytes ? load<Words8>(from) : load<Words8>(from, bytes - at);
      }
      transpose(v);
      float* to = panel + (HALF ? at / 2 : at / 4) * UNIT + r;
      for (int i = 0; i < 8; i++)
        if (HALF)
          store(to + 2 * i * UNIT, v[i] << 16), store(to + (2 * i + 1) * UNIT, v[i] & 0xffff0000);
        else
          store(to + i * UNIT, v[i]);
    }
}

void int8_panel(const Linear& layer, int64_t unit, float* panel) {
  const int64_t group = layer.group ? layer.group : layer.padded, first = unit * UNIT * (layer.padded / group);
  const char* w = (const char*)layer.weight + unit * UNIT * layer.padded;
  const uint16_t *s = (const uint16_t*)layer.scales + first, *z = layer.zeros ? layer.zeros + first : nullptr;
  Floats scale = Floats{} + 1, zero = {};
  for (int t = 0; t < UNIT; t += LANES)
    for (int64_t k = 0; k < layer.padded; k += 4, w += sizeof(Ints)) {
      if (layer.group && k % group == 0) {
        scale = widened(s, layer.fp16), s += LANES;
        if (z) zero = widened(z, layer.fp16), z += LANES;
      }
      const Words v = load<Words>(w);
      for (int i = 0; i < 4; i++) {
        const Ints q = (Ints)(v << (24 - 8 * i)) >> 24;
        store(panel + (k + i) * UNIT + t, __builtin_convertvector(q, Floats) * scale + zero);
      }
    }
}

void int4_panel(const Linear& layer, int64_t unit, float* panel) {
  const int64_t groups = layer.padded / layer.group, first = unit * UNIT * groups;
  const char* w = (const char*)layer.weight + unit * UNIT * layer.padded / 2;
  const uint16_t *s = (const uint16_t*)layer.scales + first, *z = layer.zeros + first;
  for (int t = 0; t < UNIT; t += LANES)
    for (int64_t g = 0; g < groups; g++, s += LANES, z += LANES) {
      const Floats scale = widened(s, layer.fp16), zero = widened(z, layer.fp16) - 8 * scale;
      for (int64_t k = g * layer.group; k < (g + 1) * layer.group; k += BLOCK)
        for (int i = 0; i < 16; i += 4, w += sizeof(Ints)) {
          const Words v = load<Words>(w);
          for (int j = 0; j < 4; j++)
            for (int high = 0; high < 2; high++) {
              const Ints q = (Ints)(v >> (8 * j + 4 * high)) & 15;
              store(panel + (k + 16 * high + i + j) * UNIT + t, __builtin_convertvector(q, Floats) * scale + zero);
            }
        }
    }
}

void make_panel(const Product& p, int64_t unit, float* panel) {
  const Linear& layer = *p.layer;
  if (layer.kind == INT8) return int8_panel(layer, unit, panel);
  if (layer.kind == INT4) return int4_panel(layer, unit, panel);
  const int64_t bytes = layer.K * (layer.kind == BF16 ? 2 : 4), count = least(UNIT, layer.N - unit * UNIT);
  const char* w = (const char*)layer.weight + unit * UNIT * bytes;
  const bool widens = layer.kind == BF16 && !by_halves(p);
  widens ? rows_panel<true>(w, bytes, count, panel) : rows_panel<false>(w, bytes, count, panel);
}

constexpr int PANEL_M = LANES == 16 ? 8 : 6;  // rows of x whose products with a panel fit the registers
constexpr int64_t PANEL_K = 256;               // words of each that meet a part of it that fits the first cache

// y[m] = [y[m] +] x[m] panel, for M rows of x of K words
template <bool ADD, bool HALVES, int M>
void panel_rows(const float* panel, int64_t K, const float* x, int64_t stride, float* y, int64_t y_stride) {
  constexpr int PARTS = UNIT / LANES;
  Floats acc[M][PARTS] = {};
  for (int64_t k = 0; k < K; k++, panel += UNIT) {
    Floats w[PARTS];
    for (int i = 0; i < PARTS; i++) w[i] = load<Floats>(panel + i * LANES);
    for (int m = 0; m < M; m++)
      for (int i = 0; i < PARTS; i++) acc[m][i] = multiply_add<HALVES>(acc[m][i], w[i], x[m * stride + k] - Floats{});  // in each lane
  }
  for (int m = 0; m < M; m++)
    for (int i = 0; i < PARTS; i++) {
      float* to = y + m * y_stride + i * LANES;
      store(to, ADD ? acc[m][i] + load<Floats>(to) : acc[m][i]);
    }
}

template <bool ADD, bool HALVES = false>
struct Panel {
  template <int M>
  struct Rows {
    static INLINE void run(int64_t m, const float* panel, int64_t K, const float* x, int64_t stride, float* y,
                           int64_t y_stride) {
      panel_rows<ADD, HALVES, M>(panel, K, x + m * stride, stride, y + m * y_stride, y_stride);
    }
  };
};

// --- linear ----------------------------------------------------------------------------------------------------------

// A unit of rows of W times `rows` rows of x, as `prepare` made them: to y (rows, UNIT). next: what unit
// this thread takes next, or -1
void products(const Product& p, int64_t unit, int64_t next, int64_t rows, const char* x, float* panel, float* y) {
  const Linear& layer = *p.layer;
  const float* values = (const float*)x;
  const int64_t stride = row_bytes(p) / 4;
  if (by_panels(p)) {
    make_panel(p, unit, panel);
    memset(y, 0, rows * UNIT * sizeof *y);
    const int64_t words = panel_words(p);
    for (int64_t k = 0; k < words; k += PANEL_K) {
      const int64_t part = least(PANEL_K, words - k);
      const float* w = panel + k * UNIT;
      if (by_halves(p))
        by_rows<PANEL_M, Panel<true, true>::Rows>(0, rows, w, part, values + k, stride, y, (int64_t)UNIT);
      else
        by_rows<PANEL_M, Panel<true>::Rows>(0, rows, w, part, values + k, stride, y, (int64_t)UNIT);
    }
  } else if (is_integer(layer)) {
    const int64_t blocks = layer.padded / BLOCK;
    if (layer.kind == INT4)
      by_rows<4, Int4Tiles>(0, rows * layer.parts, layer, unit, (const Block*)x, blocks, y);
    else
      by_rows<4, Int8Tiles>(0, rows * layer.parts, layer, unit, (const Block*)x, blocks, y);
    for (int64_t m = 0; layer.parts > 1 && m < rows; m++)
      for (int i = 0; i < UNIT; i++) {
        float all = 0;
        for (int part = layer.parts; part--;) all += y[(m * layer.parts + part) * UNIT + i];
        y[m * UNIT + i] = all;
      }
  } else {
    const int64_t bytes = layer.K * (layer.kind == BF16 ? 2 : 4), count = least(UNIT, layer.N - unit * UNIT);
    const char* w = (const char*)layer.weight + unit * UNIT * bytes;
#if defined(__AVX512BF16__)
    if (by_halves(p)) {
      const char* later = next < 0 ? nullptr : (const char*)layer.weight + next * UNIT * bytes;
      return by_rows<8, HalfUnits, true>(0, rows, w, bytes, count, later, x, 4 * stride, y);
    }
#endif
    if (layer.kind == BF16)
      by_rows<6, Rows<true>::Dots, true>(0, rows, w, bytes, count, values, stride, y);
    else
      by_rows<6, Rows<false>::Dots, true>(0, rows, w, bytes, count, values, stride, y);
  }
}

// What becomes of a unit's products of a row
void finish(const Product& p, int64_t unit, int64_t m, float* y) {
  const Linear& layer = *p.layer;
  const int64_t n = unit * UNIT, count = least(UNIT, layer.N - n), width = layer.swiglu ? layer.N / 2 : layer.N;
  if (layer.kind == INT8 && !layer.group)
    for (int i = 0; i < count; i++) y[i] *= widen(layer.scales, n + i, false);
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
  const int64_t row = row_bytes(p), padded = p.layer->padded;
  if (shared) return up(p.M * row, 64);
  return up(by_panels(p) ? 4 * UNIT * up(padded, 64) : up(row, 64) + 4 * (padded + 2 * LANES), 64);
}

// How many rows of x meet a unit of W
int64_t rows_at_once(const Product& p) {
  if (!by_panels(p)) return most(1, ROWS / p.layer->parts);
  const int64_t fit = most(PANEL_ROWS / 2, least(PANEL_ROWS, (384 << 10) / row_bytes(p)));
  const int64_t blocks = (p.M + fit - 1) / fit;
  return up((p.M + blocks - 1) / blocks, PANEL_M);
}

void linear(const Product& p, Team& team, Scratch scratch) {
  const Linear& layer = *p.layer;
  const int64_t row = row_bytes(p);
  char* rows = scratch.shared;
  float* wide = (float*)(scratch.own + up(row, 64));
  if (p.M == 1)  // sooner done by each thread than waited for
    prepare(p, 0, wide, rows = scratch.own);
  else {
    for (int64_t m; (m = team.take()) < p.M;) prepare(p, m, wide, rows + m * row);
    team.wait();
  }
  const int64_t units = (layer.N + UNIT - 1) / UNIT, chunk = most(1, units / (8 * team.threads));
  const int64_t chunks = (units + chunk - 1) / chunk, few = rows_at_once(p);
  float y[(PANEL_ROWS + PANEL_M) * UNIT];
  const int64_t tasks = chunks * ((p.M + few - 1) / few);
  const bool asks = by_halves(p) && !by_panels(p);  // for its next task's weights, which it must know
  for (int64_t task = team.take(), later; task < tasks; task = asks ? later : team.take()) {
    const int64_t first = task / chunks * few, count = least(few, p.M - first), begin = task % chunks * chunk;
    const int64_t end = least(begin + chunk, units);
    later = asks ? team.take() : tasks;
    for (int64_t unit = begin; unit < end; unit++) {
      const int64_t next = unit + 1 < end ? unit + 1 : later < tasks ? later % chunks * chunk : -1;
      products(p, unit, next, count, rows + first * row, (float*)scratch.own, y);
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

constexpr bool scaled(int kind) { return kind == INT8 || kind == FP8; }
constexpr int64_t bytes_of(int kind) { return scaled(kind) ? 1 : kind == BF16 ? 2 : 4; }

// Eight bytes from `from` on as int32. (Of a conversion between short vectors gcc 12 makes a move for each.)
template <class Byte>
INLINE Ints8 bytes8(const void* from) {
#if defined(__AVX2__)
  const __m128i bytes = _mm_loadl_epi64((const __m128i*)from);
  return (Ints8)((Byte)-1 < 0 ? _mm256_cvtepi8_epi32(bytes) : _mm256_cvtepu8_epi32(bytes));
#else
  typedef Byte Eight __attribute__((vector_size(8)));
  return __builtin_convertvector(load<Eight>(from), Ints8);
#endif
}

// Eight values of a cache, without their scale
template <int KIND>
INLINE Floats8 cached8(const void* from, int64_t at) {
  if constexpr (!scaled(KIND)) return widen8(from, at, KIND == BF16);
  from = (const char*)from + at;
  if constexpr (KIND == INT8) return __builtin_convertvector(bytes8<uint8_t>(from) - 128, Floats8);
  // The sign stays where extending it put it. The exponent's bias is 7 instead of 127.
  return (Floats8)((Words8)bytes8<int8_t>(from) << 20 & 0x87f00000) * 0x1p120f;
}

// A head (D,) in 8 bits, and its scale: kv_cache.py's quantize
void encode(const Attention& a, const float* head, uint8_t* to, uint16_t* scale) {
  float top = 0x1p-100f, sum = 0;
  for (int64_t d = 0; d < a.D; d++) top = fabsf(head[d]) > top ? fabsf(head[d]) : top, sum += head[d];
  top = sum != sum ? NAN : top / (a.kind == INT8 ? 127 : 448);  // 8 bits of int8 hold no NaN
  uint32_t bits = (load<uint32_t>(&top) + 0xffff) & 0xffff0000;
  *scale = bits >> 16;
  const float grid = load<float>(&bits);
  for (int64_t d = 0; d < a.D; d++) {
    const float x = head[d] / grid;
    if (a.kind == INT8) {
      to[d] = x == x ? (uint8_t)(int32_t)(rintf(x) + 128) : 128;
      continue;
    }
    // To 3 bits behind the leading one, or to a multiple of 2^-9
    uint32_t word = load<uint32_t>(&x), exponent = word & 0x7f800000;
    const float of_two = load<float>(&exponent) > 0x1p-6f ? load<float>(&exponent) : 0x1p-6f;
    const float y = fabsf(x) + of_two * 0x1.8p20f - of_two * 0x1.8p20f;
    const uint32_t code = y < 0x1p-6f ? (uint32_t)(y * 512) : (load<uint32_t>(&y) >> 20) - 960;
    to[d] = (x == x ? code : 127) | (word >> 24 & 128);
  }
}

// Keys and values of row b's token s and key head h, into the caches
void write_cache(const Attention& a, int64_t b, int64_t s, int64_t h, float* head) {
  const int64_t position = a.pos[b] + s, at = b * a.of_row + h * a.of_head + position * a.D;
  const int64_t from = (b * a.S + s) * (a.H + 2 * a.Hkv) * a.D + (a.H + h) * a.D;
  if (position >= a.T) return;
  const int64_t of_scale = b * a.scales_of_row + h * a.scales_of_head + position;
  for (int value = 0; value < 2; value++) {
    void* to = value ? a.v : a.k;
    if (value)
      for (int64_t d = 0; d < a.D; d += 8) store(head + d, widen8(a.qkv, from + a.Hkv * a.D + d, a.half_x));
    else
      turned(a, from, a.k_norm, position, head);
    if (scaled(a.kind))
      encode(a, head, (uint8_t*)to + at, (value ? a.v_scales : a.k_scales) + of_scale);
    else
      for (int64_t d = 0; d < a.D; d += 8) narrow8(load<Floats8>(head + d), to, at + d, a.kind == BF16);
  }
}

constexpr int64_t KEYS = 64;  // that a block of queries meets at a time

// New tokens whose queries of the heads that share a key make up a block; 0: each query goes by itself
int64_t block_tokens(const Attention& a) { return a.S < 2 ? 0 : least(a.S, most(1, 96 / (a.H / a.Hkv))); }

int64_t attention_scratch(const Attention& a) {
  const int64_t rows = block_tokens(a) * (a.H / a.Hkv), wide = up(a.D, UNIT);
  const int64_t block = rows * (a.D + wide + KEYS + 2) + UNIT * most(wide, KEYS);
  return up(4 * most(block, up(a.T, 8) + 3 * a.D), 64);
}

// Query head h of row b's token s. D8: of D / 8, or 0
template <int KIND, int D8>
void attend(const Attention& a, int64_t b, int64_t s, int64_t h, float* scratch) {
  const int64_t D = D8 ? 8 * D8 : a.D, last = a.pos[b] + s, size = bytes_of(KIND), of = h / (a.H / a.Hkv);
  const int64_t first = a.window > 0 ? most(0, last - a.window + 1) : 0, count = most(0, least(last + 1, a.T) - first);
  const int64_t at = b * a.of_row + of * a.of_head + first * D;
  const int64_t scales = b * a.scales_of_row + of * a.scales_of_head + first;
  const char *keys = (const char*)a.k + at * size, *values = (const char*)a.v + at * size;
  float *q = scratch, *acc = q + D, *p = acc + 2 * D;
  turned(a, ((b * a.S + s) * (a.H + 2 * a.Hkv) + h) * D, a.q_norm, last, q);
  const float scale = (float)(1 / (sqrt((double)D) * 0.6931471805599453));
  for (int64_t d = 0; d < D; d++) q[d] *= scale;
  float top = -INFINITY;
  for (int64_t t = 0; t < count; t++) {
    Floats8 y = {};
    for (int64_t d = 0; d < D; d += 8) y += cached8<KIND>(keys + t * D * size, d) * load<Floats8>(q + d);
    p[t] = scaled(KIND) ? sum(y) * widen(a.k_scales, scales + t, true) : sum(y);
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
  if (scaled(KIND))
    for (int64_t t = 0; t < count; t++) p[t] *= widen(a.v_scales, scales + t, true);
  const int64_t out = (b * a.S + s) * a.H * D + h * D;
  if constexpr (D8 > 0) {
    Floats8 y[D8] = {};
    for (int64_t t = 0; t < count; t++)
      for (int d = 0; d < D8; d++) y[d] += cached8<KIND>(values + t * D * size, 8 * d) * p[t];
    for (int d = 0; d < D8; d++) narrow8(y[d] / total, a.y, out + 8 * d, a.half_x);
  } else
    for (int64_t d = 0; d < D; d += 8) {
      Floats8 y = {};
      for (int64_t t = 0; t < count; t++) y += cached8<KIND>(values + t * D * size, d) * p[t];
      narrow8(y / total, a.y, out + d, a.half_x);
    }
}

// 2^(scores - top) of KEYS scores, of which those from `first` to `end` are seen, in their place. Returns by what earlier
// sums must be multiplied, as they were made with an older top. (Milakov and Gimelshein, arXiv:1805.02867)
float soften(float* scores, int64_t first, int64_t end, float* top, float* total) {
  if (first > 0 || end < KEYS)
    for (int64_t t = 0; t < KEYS; t++) scores[t] = t >= first && t < end ? scores[t] : -INFINITY;
  Floats8 tops = load<Floats8>(scores), totals = {};
  for (int64_t t = 8; t < KEYS; t += 8) {
    Floats8 v = load<Floats8>(scores + t);
    tops = v > tops ? v : tops;
  }
  const float before = *top;
  for (int i = 0; i < 8; i++) *top = tops[i] > *top ? tops[i] : *top;
  const float base = *top > -INFINITY ? *top : 0;
  for (int64_t t = 0; t < KEYS; t += 8) {
    Floats8 v = load<Floats8>(scores + t), e = exp2_of(v - base);
    e = v > -INFINITY ? e : v != v ? v : e * 0;
    store(scores + t, e);
    totals += e;
  }
  const float factor = before > -INFINITY ? exp2f(before - base) : 0;
  *total = *total * factor + sum(totals);
  return factor;
}

// Values of `count` tokens from feature d on, as a panel (KEYS, UNIT)
template <int KIND>
void values_panel(const char* values, int64_t D, int64_t d, int64_t count, float* panel) {
  for (int64_t t = 0; t < KEYS; t++, panel += UNIT)
    for (int i = 0; i < UNIT; i += 8)
      store(panel + i, t < count && d + i < D ? cached8<KIND>(values, t * D + d + i) : Floats8{});
}

// `count` of 16 keys, as a panel (D, UNIT)
template <int KIND>
void keys_panel(const char* keys, int64_t D, int64_t count, float* panel) {
  if constexpr (!scaled(KIND)) return rows_panel<KIND == BF16>(keys, D * bytes_of(KIND), count, panel);
  for (int r = 0; r < UNIT; r += 8)
    for (int64_t d = 0; d < D; d += 8) {
      Words8 v[8] = {};
      for (int i = 0; i < 8 && r + i < count; i++) v[i] = (Words8)cached8<KIND>(keys + (r + i) * D, d);
      transpose(v);
      for (int i = 0; i < 8; i++) store(panel + (d + i) * UNIT + r, v[i]);
    }
}

// The queries of new tokens s..s + tokens of row b that share key head h: flash attention (Dao, arXiv:2307.08691)
template <int KIND>
void attend_block(const Attention& a, int64_t b, int64_t h, int64_t s, int64_t tokens, float* scratch) {
  const int64_t G = a.H / a.Hkv, D = a.D, wide = up(D, UNIT), rows = tokens * G, bytes = D * bytes_of(KIND);
  const int64_t position = a.pos[b] + s, end = least(position + tokens, a.T);
  const int64_t at = (b * a.of_row + h * a.of_head) * bytes_of(KIND);
  const int64_t scales = b * a.scales_of_row + h * a.scales_of_head;
  float *q = scratch, *y = q + rows * D, *scores = y + rows * wide, *tops = scores + rows * KEYS, *totals = tops + rows;
  float* panel = totals + rows;
  const float scale = (float)(1 / (sqrt((double)D) * 0.6931471805599453));
  for (int64_t row = 0; row < rows; row++) {
    const int64_t token = b * a.S + s + row / G;
    turned(a, (token * (a.H + 2 * a.Hkv) + h * G + row % G) * D, a.q_norm, position + row / G, q + row * D);
    for (int64_t d = 0; d < D; d++) q[row * D + d] *= scale;
    tops[row] = -INFINITY, totals[row] = 0;
  }
  memset(y, 0, rows * wide * sizeof *y);
  for (int64_t t = a.window > 0 ? most(0, position - a.window + 1) : 0; t < end; t += KEYS) {
    const int64_t count = least(KEYS, end - t);
    for (int64_t i = 0; i < KEYS; i += UNIT) {
      keys_panel<KIND>((const char*)a.k + at + (t + i) * bytes, D, count - i, panel);
      by_rows<PANEL_M, Panel<false>::Rows>(0, rows, panel, D, q, D, scores + i, KEYS);
    }
    float of_keys[KEYS] = {}, of_values[KEYS] = {};
    for (int64_t i = 0; scaled(KIND) && i < count; i++)
      of_keys[i] = widen(a.k_scales, scales + t + i, true), of_values[i] = widen(a.v_scales, scales + t + i, true);
    for (int64_t row = 0; row < rows; row++) {
      for (int64_t i = 0; scaled(KIND) && i < KEYS; i++) scores[row * KEYS + i] *= of_keys[i];
      const int64_t last = position + row / G, first = a.window > 0 ? last - a.window + 1 - t : 0;
      const float factor = soften(scores + row * KEYS, first, least(count, last + 1 - t), tops + row, totals + row);
      if (factor != 1)
        for (int64_t d = 0; d < wide; d++) y[row * wide + d] *= factor;
      for (int64_t i = 0; scaled(KIND) && i < KEYS; i++) scores[row * KEYS + i] *= of_values[i];
    }
    for (int64_t d = 0; d < D; d += UNIT) {
      values_panel<KIND>((const char*)a.v + at + t * bytes, D, d, count, panel);
      by_rows<PANEL_M, Panel<true>::Rows>(0, rows, panel, KEYS, scores, KEYS, y + d, wide);
    }
  }
  for (int64_t row = 0; row < rows; row++) {
    const float total = totals[row] > 0 || totals[row] != totals[row] ? totals[row] : 1;  // as in `attend`
    const int64_t out = ((b * a.S + s + row / G) * a.H + h * G + row % G) * D;
    for (int64_t d = 0; d < D; d += 8) narrow8(load<Floats8>(y + row * wide + d) / total, a.y, out + d, a.half_x);
  }
}

template <int KIND>
void attend_all(const Attention& a, Team& team, float* own) {
  if (const int64_t tokens = block_tokens(a)) {
    const int64_t blocks = (a.S + tokens - 1) / tokens;
    for (int64_t task; (task = team.take()) < a.B * a.Hkv * blocks;) {
      const int64_t s = (blocks - 1 - task / (a.B * a.Hkv)) * tokens, pair = task % (a.B * a.Hkv);  // the longest first
      attend_block<KIND>(a, pair / a.Hkv, pair % a.Hkv, s, least(tokens, a.S - s), own);
    }
  } else {
    const auto run = a.D == 64 ? attend<KIND, 8> : attend<KIND, 0>;
    for (int64_t task; (task = team.take()) < a.B * a.H * a.S;)
      run(a, task / a.H / a.S, task / a.H % a.S, task % a.H, own);
  }
}

void attention(const Attention& a, Team& team, Scratch scratch) {
  float* own = (float*)scratch.own;
  for (int64_t task; (task = team.take()) < a.B * a.S * a.Hkv;)
    write_cache(a, task / a.Hkv / a.S, task / a.Hkv % a.S, task % a.Hkv, own);
  team.wait();
  switch (a.kind) {
    case FP32: attend_all<FP32>(a, team, own); break;
    case BF16: attend_all<BF16>(a, team, own); break;
    case INT8: attend_all<INT8>(a, team, own); break;
    default: attend_all<FP8>(a, team, own);
  }
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
    const bool half = step.half;
    Attention a = step.attention;
    void* const* cache = step.caches + 4 * i;
    a.qkv = qkv, a.y = y, a.k = cache[0], a.v = cache[1];
    a.k_scales = (uint16_t*)cache[2], a.v_scales = (uint16_t*)cache[3];
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
