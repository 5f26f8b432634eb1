// Fused float32 training kernels for one thread and channels_last memory: rows are pixels, c is the number of channels.
#include <immintrin.h>
#include <math.h>
#include <string.h>
#include <algorithm>

static const int CHUNK = 256, MAX_C = 128;

// cephes' expf
static inline __m256 exp8(__m256 x) {
    x = _mm256_min_ps(_mm256_max_ps(x, _mm256_set1_ps(-87.0f)), _mm256_set1_ps(87.0f));
    __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
    x = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);
    x = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), x);
    __m256 p = _mm256_set1_ps(1.9875691500e-4f);
    p = _mm256_fmadd_ps(p, x, _mm256_set1_ps(1.3981999507e-3f));
    p = _mm256_fmadd_ps(p, x, _mm256_set1_ps(8.3334519073e-3f));
    p = _mm256_fmadd_ps(p, x, _mm256_set1_ps(4.1665795894e-2f));
    p = _mm256_fmadd_ps(p, x, _mm256_set1_ps(1.6666665459e-1f));
    p = _mm256_fmadd_ps(p, x, _mm256_set1_ps(5.0000001201e-1f));
    p = _mm256_fmadd_ps(_mm256_mul_ps(x, x), p, _mm256_add_ps(x, _mm256_set1_ps(1.0f)));
    __m256i e = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(p, _mm256_castsi256_ps(e));
}

static inline __m256 sigmoid8(__m256 x) {
    __m256 one = _mm256_set1_ps(1.0f);
    return _mm256_div_ps(one, _mm256_add_ps(one, exp8(_mm256_sub_ps(_mm256_setzero_ps(), x))));
}

// the slope of SiLU at z, from sigmoid(z) and z * sigmoid(z)
static inline __m256 silu_slope8(__m256 sigmoid, __m256 silu) {
    return _mm256_fmadd_ps(silu, _mm256_sub_ps(_mm256_set1_ps(1.0f), sigmoid), sigmoid);
}

extern "C" {

// mean and sum of squared deviations of each channel: exact in chunks, combined in double (Chan et al. 1979);
// `seen` rows are in mean and m2 already
static void add_statistics(const float* x, long rows, int c, double* mean, double* m2, long seen) {
    for (long start = 0; start < rows; start += CHUNK) {
        long n = std::min<long>(CHUNK, rows - start), before = seen + start;
        float sum[MAX_C] = {0}, squares[MAX_C] = {0}, chunk_mean[MAX_C];
        const float* p = x + start * c;
        for (long r = 0; r < n; r++)
            for (int i = 0; i < c; i++) sum[i] += p[r * c + i];
        for (int i = 0; i < c; i++) chunk_mean[i] = sum[i] / n;
        for (long r = 0; r < n; r++)
            for (int i = 0; i < c; i++) {
                float d = p[r * c + i] - chunk_mean[i];
                squares[i] += d * d;
            }
        for (int i = 0; i < c; i++) {
            double delta = chunk_mean[i] - mean[i], total = before + n;
            mean[i] += delta * n / total;
            m2[i] += squares[i] + delta * delta * before * n / total;
        }
    }
}

void bn_statistics(const float* x, long rows, int c, double* mean, double* m2) {
    memset(mean, 0, c * sizeof(double));
    memset(m2, 0, c * sizeof(double));
    add_statistics(x, rows, c, mean, m2, 0);
}

// y = SiLU(x * scale + shift)
void bn_silu_forward(const float* x, float* y, long rows, int c, const float* scale, const float* shift) {
    for (long r = 0; r < rows; r++)
        for (int i = 0; i < c; i += 8) {
            __m256 z = _mm256_fmadd_ps(_mm256_loadu_ps(x + r * c + i), _mm256_loadu_ps(scale + i),
                                       _mm256_loadu_ps(shift + i));
            _mm256_storeu_ps(y + r * c + i, _mm256_mul_ps(z, sigmoid8(z)));
        }
}

// dz, the gradient before SiLU, and the sums of dz and dz * (x - mean)
void bn_silu_backward_sums(const float* x, const float* dy, float* dz, long rows, int c, const float* scale,
                           const float* shift, const float* mean, double* sum, double* dot) {
    memset(sum, 0, c * sizeof(double));
    memset(dot, 0, c * sizeof(double));
    for (long start = 0; start < rows; start += CHUNK) {
        long n = std::min<long>(CHUNK, rows - start);
        float s[MAX_C] = {0}, d[MAX_C] = {0};
        for (long r = start; r < start + n; r++)
            for (int i = 0; i < c; i += 8) {
                __m256 value = _mm256_loadu_ps(x + r * c + i);
                __m256 z = _mm256_fmadd_ps(value, _mm256_loadu_ps(scale + i), _mm256_loadu_ps(shift + i));
                __m256 sig = sigmoid8(z), slope = silu_slope8(sig, _mm256_mul_ps(z, sig));
                __m256 grad = _mm256_mul_ps(_mm256_loadu_ps(dy + r * c + i), slope);
                _mm256_storeu_ps(dz + r * c + i, grad);
                _mm256_storeu_ps(s + i, _mm256_add_ps(_mm256_loadu_ps(s + i), grad));
                value = _mm256_sub_ps(value, _mm256_loadu_ps(mean + i));
                _mm256_storeu_ps(d + i, _mm256_fmadd_ps(grad, value, _mm256_loadu_ps(d + i)));
            }
        for (int i = 0; i < c; i++) sum[i] += s[i], dot[i] += d[i];
    }
}

// dz becomes scale * dz - a - b * (x - mean), the gradient of x
void bn_backward(const float* x, float* dz, long rows, int c, const float* scale, const float* mean, const float* a,
                 const float* b) {
    for (long r = 0; r < rows; r++)
#pragma GCC ivdep
        for (int i = 0; i < c; i++)
            dz[r * c + i] = scale[i] * dz[r * c + i] - a[i] - b[i] * (x[r * c + i] - mean[i]);
}

}

// gradient (3, 3, c) of the weight of a depthwise 3x3 convolution with padding 1, added to out, for one image
static void add_depthwise_weight_gradient(const float* x, const float* grad, int height, int width, int c, double* out) {
    float total[9 * MAX_C] = {0};
    for (int h = 0; h < height; h++)
        for (int dh = std::max(-1, -h); dh <= std::min(1, height - 1 - h); dh++)
            for (int k = 0; k < c; k += 16) {
                const float* g = grad + (long)h * width * c + k;
                const float* p = x + (long)(h + dh) * width * c + k;
                __m256 zero = _mm256_setzero_ps(), sums[6] = {zero, zero, zero, zero, zero, zero};
                __m256 before[2] = {zero, zero}, here[2] = {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)};
                for (int w = 0; w < width; w++, g += c, p += c) {
                    bool last = w == width - 1;
                    __m256 after[2] = {zero, zero};
                    if (!last) after[0] = _mm256_loadu_ps(p + c), after[1] = _mm256_loadu_ps(p + c + 8);
                    for (int i = 0; i < 2; i++) {
                        __m256 d = _mm256_loadu_ps(g + 8 * i);
                        sums[i] = _mm256_fmadd_ps(d, before[i], sums[i]);
                        sums[2 + i] = _mm256_fmadd_ps(d, here[i], sums[2 + i]);
                        sums[4 + i] = _mm256_fmadd_ps(d, after[i], sums[4 + i]);
                        before[i] = here[i];
                        here[i] = after[i];
                    }
                }
                for (int tap = 0; tap < 3; tap++)
                    for (int i = 0; i < 2; i++) {
                        float* t = total + (3 * (dh + 1) + tap) * c + k + 8 * i;
                        _mm256_storeu_ps(t, _mm256_add_ps(_mm256_loadu_ps(t), sums[2 * tap + i]));
                    }
            }
    for (int i = 0; i < 9 * c; i++) out[i] += total[i];
}

// y = add + depthwise 3x3 convolution of x, padding 1, for one image; the taps are (9, c), add may be null
static void depthwise(const float* x, const float* taps, const float* add, float* y, int height, int width, int c) {
    static const float zeros[32 * MAX_C] = {0};
    for (int h = 0; h < height; h++)
        for (int k = 0; k < c; k += 8) {
            const float* above = h > 0 ? x + (long)(h - 1) * width * c + k : zeros;
            const float* here = x + (long)h * width * c + k;
            const float* below = h < height - 1 ? x + (long)(h + 1) * width * c + k : zeros;
            __m256 w[9], current = _mm256_setzero_ps(), previous = current;
            for (int i = 0; i < 9; i++) w[i] = _mm256_loadu_ps(taps + i * c + k);
            const float* a = add ? add + (long)h * width * c + k : nullptr;
            float* out = y + (long)h * width * c + k;
            for (int p = 0; p <= width; p++) {  // pixel p ends the sum of p - 1, and begins that of p + 1
                __m256 next = _mm256_setzero_ps();
                if (p < width) {
                    __m256 x0 = _mm256_loadu_ps(above + p * c), x1 = _mm256_loadu_ps(here + p * c);
                    __m256 x2 = _mm256_loadu_ps(below + p * c);
                    previous = _mm256_fmadd_ps(x0, w[2], previous);
                    previous = _mm256_fmadd_ps(x1, w[5], previous);
                    previous = _mm256_fmadd_ps(x2, w[8], previous);
                    current = _mm256_fmadd_ps(x0, w[1], current);
                    current = _mm256_fmadd_ps(x1, w[4], current);
                    current = _mm256_fmadd_ps(x2, w[7], current);
                    next = _mm256_mul_ps(x0, w[0]);
                    next = _mm256_fmadd_ps(x1, w[3], next);
                    next = _mm256_fmadd_ps(x2, w[6], next);
                }
                if (p > 0) {
                    if (a) previous = _mm256_add_ps(previous, _mm256_loadu_ps(a + (p - 1) * c));
                    _mm256_storeu_ps(out + (p - 1) * c, previous);
                }
                previous = current;
                current = next;
            }
        }
}

// --- a gated block --------------------------------------------------------------------------------
//
// A flip-equivariant 1x1 layer maps the halves (a, b) to (A a + B b, B a + A b). With s = a + b and d = a - b that is
// (S s + D d, S s - D d), S = (A + B) / 2, D = (A - B) / 2: half of the multiplications. A layer's matrices (2, H, H)
// are S and D, rows for inputs. Tiles of TILE pixels stay in the cache from the batch norm to the end of the block.

static const int TILE = 96;

// in a register: the compiler would load it again for each use
static inline __m256 loaded(const float* p) {
    __m256 x = _mm256_loadu_ps(p);
    asm("" : "+x"(x));
    return x;
}

// R rows and 8 * V columns of a product: the sum over k < K of in[i * ROW + k * COLUMN] * right[k * H + j], stored as
// out[i * H + j] or added to it. R * V vectors stay in the registers.
template <int H, int R, int V, int K, int ROW, int COLUMN, bool ADD>
static void multiply_block(const float* in, const float* right, float* out) {
    __m256 sum[R][V];
#pragma GCC unroll 12
    for (int i = 0; i < R; i++)
#pragma GCC unroll 3
        for (int j = 0; j < V; j++) sum[i][j] = ADD ? _mm256_loadu_ps(out + i * H + 8 * j) : _mm256_setzero_ps();
    for (int k = 0; k < K; k++) {
        __m256 row[V];
#pragma GCC unroll 3
        for (int j = 0; j < V; j++) row[j] = loaded(right + k * H + 8 * j);
#pragma GCC unroll 12
        for (int i = 0; i < R; i++) {
            __m256 x = _mm256_broadcast_ss(in + i * ROW + k * COLUMN);
#pragma GCC unroll 3
            for (int j = 0; j < V; j++) sum[i][j] = _mm256_fmadd_ps(x, row[j], sum[i][j]);
        }
    }
#pragma GCC unroll 12
    for (int i = 0; i < R; i++)
#pragma GCC unroll 3
        for (int j = 0; j < V; j++) _mm256_storeu_ps(out + i * H + 8 * j, sum[i][j]);
}

// out (TILE, H) = in (TILE, H) @ w (H, H), or added to out
template <int H, bool ADD>
static void multiply(const float* in, const float* w, float* out) {
    constexpr int V = H == 24 ? 3 : H == 8 ? 1 : 2, R = 12 / V;
    for (int n = 0; n < H; n += 8 * V)
        for (int r = 0; r < TILE; r += R)
            multiply_block<H, R, V, H, H, 1, ADD>(in + r * H, w + n, out + r * H + n);
}

// out (H, H) += in (TILE, H) transposed @ grad (TILE, H)
template <int H>
static void multiply_transposed(const float* in, const float* grad, float* out) {
    constexpr int V = H == 24 ? 3 : H == 8 ? 1 : 2, R = H == 24 ? 4 : H == 8 ? 8 : 6, LAST = H % R;
    for (int n = 0; n < H; n += 8 * V) {
        for (int k = 0; k + R <= H; k += R)
            multiply_block<H, R, V, TILE, 1, H, true>(in + k, grad + n, out + k * H + n);
        if constexpr (LAST > 0)
            multiply_block<H, LAST, V, TILE, 1, H, true>(in + H - LAST, grad + n, out + (H - LAST) * H + n);
    }
}

template <int H>
struct Tile {
    typedef float Half[TILE * H];
    alignas(32) Half zs, zd, vs, vd, gs, gd, hs, hd;

    // batch norm and clamp of t, then the values and the gates, as sums and differences
    void load(const float* t, int n, const float* scale, const float* shift, const float* wv, const float* wg) {
        const __m256 low = _mm256_set1_ps(-4.0f), high = _mm256_set1_ps(4.0f);
        for (int i = 0; i < H; i += 8) {
            __m256 s = _mm256_loadu_ps(scale + i), b = _mm256_loadu_ps(shift + i);
            for (int r = 0; r < n; r++) {
                __m256 za = _mm256_fmadd_ps(_mm256_loadu_ps(t + r * 2 * H + i), s, b);
                __m256 zb = _mm256_fmadd_ps(_mm256_loadu_ps(t + r * 2 * H + H + i), s, b);
                za = _mm256_min_ps(_mm256_max_ps(za, low), high);
                zb = _mm256_min_ps(_mm256_max_ps(zb, low), high);
                _mm256_store_ps(zs + r * H + i, _mm256_add_ps(za, zb));
                _mm256_store_ps(zd + r * H + i, _mm256_sub_ps(za, zb));
            }
        }
        for (int i = n * H; i < TILE * H; i++) zs[i] = zd[i] = 0.0f;
        multiply<H, false>(zs, wv, vs);
        multiply<H, false>(zd, wv + H * H, vd);
        multiply<H, false>(zs, wg, gs);
        multiply<H, false>(zd, wg + H * H, gd);
    }
};

template <int H>
static void block_forward_(const float* x, const float* t, float* y, long rows, const float* scale, const float* shift,
                           const float* wv, const float* wg, const float* wo) {
    static thread_local Tile<H> tile;
    for (long start = 0; start < rows; start += TILE) {
        int n = std::min<long>(TILE, rows - start);
        tile.load(t + start * 2 * H, n, scale, shift, wv, wg);
        for (int i = 0; i < TILE * H; i += 8) {
            __m256 s = _mm256_load_ps(tile.vs + i), d = _mm256_load_ps(tile.vd + i);
            __m256 p = _mm256_load_ps(tile.gs + i), m = _mm256_load_ps(tile.gd + i);
            __m256 ga = _mm256_add_ps(p, m), gb = _mm256_sub_ps(p, m);
            __m256 ha = _mm256_mul_ps(_mm256_add_ps(s, d), _mm256_mul_ps(ga, sigmoid8(ga)));
            __m256 hb = _mm256_mul_ps(_mm256_sub_ps(s, d), _mm256_mul_ps(gb, sigmoid8(gb)));
            _mm256_store_ps(tile.hs + i, _mm256_add_ps(ha, hb));
            _mm256_store_ps(tile.hd + i, _mm256_sub_ps(ha, hb));
        }
        multiply<H, false>(tile.hs, wo, tile.vs);
        multiply<H, false>(tile.hd, wo + H * H, tile.vd);
        for (int r = 0; r < n; r++)
            for (int i = 0; i < H; i += 8) {
                long a = (start + r) * 2 * H + i, b = a + H;
                __m256 s = _mm256_load_ps(tile.vs + r * H + i), d = _mm256_load_ps(tile.vd + r * H + i);
                _mm256_storeu_ps(y + a, _mm256_add_ps(_mm256_loadu_ps(x + a), _mm256_add_ps(s, d)));
                _mm256_storeu_ps(y + b, _mm256_add_ps(_mm256_loadu_ps(x + b), _mm256_sub_ps(s, d)));
            }
    }
}

// dz: the gradient before the clamp; sum, dot: of dz and dz * (t - mean); the gradients of the matrices in float64
template <int H>
static void block_backward_(const float* t, const float* dy, float* dz, long rows, const float* scale,
                            const float* shift, const float* mean, const float* wv, const float* wg, const float* wvt,
                            const float* wgt, const float* wot, double* dw, double* sum, double* dot) {
    static thread_local Tile<H> tile;
    static thread_local struct { alignas(32) typename Tile<H>::Half os, od, dhs, dhd; } grad;
    alignas(32) float dw32[6 * H * H] = {0};
    const __m256 four = _mm256_set1_ps(4.0f), sign = _mm256_set1_ps(-0.0f);
    long tiles = 0;
    for (long start = 0; start < rows; start += TILE) {
        int n = std::min<long>(TILE, rows - start);
        tile.load(t + start * 2 * H, n, scale, shift, wv, wg);
        for (int r = 0; r < n; r++)
            for (int i = 0; i < H; i += 8) {
                const float* p = dy + (start + r) * 2 * H + i;
                __m256 a = _mm256_loadu_ps(p), b = _mm256_loadu_ps(p + H);
                _mm256_store_ps(grad.os + r * H + i, _mm256_add_ps(a, b));
                _mm256_store_ps(grad.od + r * H + i, _mm256_sub_ps(a, b));
            }
        for (int i = n * H; i < TILE * H; i++) grad.os[i] = grad.od[i] = 0.0f;
        multiply<H, false>(grad.os, wot, grad.dhs);
        multiply<H, false>(grad.od, wot + H * H, grad.dhd);
        for (int i = 0; i < TILE * H; i += 8) {
            __m256 s = _mm256_load_ps(tile.vs + i), d = _mm256_load_ps(tile.vd + i);
            __m256 p = _mm256_load_ps(tile.gs + i), m = _mm256_load_ps(tile.gd + i);
            __m256 ds = _mm256_load_ps(grad.dhs + i), dd = _mm256_load_ps(grad.dhd + i);
            __m256 v[2] = {_mm256_add_ps(s, d), _mm256_sub_ps(s, d)}, g[2] = {_mm256_add_ps(p, m), _mm256_sub_ps(p, m)};
            __m256 dh[2] = {_mm256_add_ps(ds, dd), _mm256_sub_ps(ds, dd)}, h[2], dv[2], dg[2];
#pragma GCC unroll 2
            for (int j = 0; j < 2; j++) {
                __m256 sig = sigmoid8(g[j]), silu = _mm256_mul_ps(g[j], sig);
                h[j] = _mm256_mul_ps(v[j], silu);
                dv[j] = _mm256_mul_ps(dh[j], silu);
                dg[j] = _mm256_mul_ps(_mm256_mul_ps(dh[j], v[j]), silu_slope8(sig, silu));
            }
            _mm256_store_ps(tile.hs + i, _mm256_add_ps(h[0], h[1]));
            _mm256_store_ps(tile.hd + i, _mm256_sub_ps(h[0], h[1]));
            _mm256_store_ps(tile.vs + i, _mm256_add_ps(dv[0], dv[1]));
            _mm256_store_ps(tile.vd + i, _mm256_sub_ps(dv[0], dv[1]));
            _mm256_store_ps(tile.gs + i, _mm256_add_ps(dg[0], dg[1]));
            _mm256_store_ps(tile.gd + i, _mm256_sub_ps(dg[0], dg[1]));
        }
        multiply_transposed<H>(tile.zs, tile.vs, dw32);
        multiply_transposed<H>(tile.zd, tile.vd, dw32 + H * H);
        multiply_transposed<H>(tile.zs, tile.gs, dw32 + 2 * H * H);
        multiply_transposed<H>(tile.zd, tile.gd, dw32 + 3 * H * H);
        multiply_transposed<H>(tile.hs, grad.os, dw32 + 4 * H * H);
        multiply_transposed<H>(tile.hd, grad.od, dw32 + 5 * H * H);
        multiply<H, false>(tile.vs, wvt, grad.dhs);
        multiply<H, true>(tile.gs, wgt, grad.dhs);
        multiply<H, false>(tile.vd, wvt + H * H, grad.dhd);
        multiply<H, true>(tile.gd, wgt + H * H, grad.dhd);
        for (int i = 0; i < H; i += 8) {
            __m256 sc = _mm256_loadu_ps(scale + i), sh = _mm256_loadu_ps(shift + i), mu = _mm256_loadu_ps(mean + i);
            __m256 sums = _mm256_setzero_ps(), dots = sums;
            for (int r = 0; r < n; r++) {
                __m256 s = _mm256_load_ps(grad.dhs + r * H + i), d = _mm256_load_ps(grad.dhd + r * H + i);
                __m256 both[2] = {_mm256_add_ps(s, d), _mm256_sub_ps(s, d)};
#pragma GCC unroll 2
                for (int j = 0; j < 2; j++) {
                    long at = (start + r) * 2 * H + j * H + i;
                    __m256 value = _mm256_loadu_ps(t + at), z = _mm256_fmadd_ps(value, sc, sh);
                    __m256 inside = _mm256_cmp_ps(_mm256_andnot_ps(sign, z), four, _CMP_LT_OQ);
                    __m256 result = _mm256_and_ps(both[j], inside);
                    _mm256_storeu_ps(dz + at, result);
                    sums = _mm256_add_ps(sums, result);
                    dots = _mm256_fmadd_ps(result, _mm256_sub_ps(value, mu), dots);
                }
            }
            alignas(32) float lanes[16];
            _mm256_store_ps(lanes, sums);
            _mm256_store_ps(lanes + 8, dots);
            for (int j = 0; j < 8; j++) sum[i + j] += lanes[j], dot[i + j] += lanes[8 + j];
        }
        if (++tiles % 16 == 0 || start + TILE >= rows)
            for (int i = 0; i < 6 * H * H; i++) dw[i] += dw32[i], dw32[i] = 0.0f;
    }
}

extern "C" {

// t = depthwise convolution of x, and its statistics over both halves of the channels; none where mean is null
void depthwise_forward(const float* x, const float* taps, float* t, int n, int height, int width, int c, double* mean,
                       double* m2) {
    long size = (long)height * width * c;
    if (mean) memset(mean, 0, c / 2 * sizeof(double)), memset(m2, 0, c / 2 * sizeof(double));
    for (int image = 0; image < n; image++) {
        depthwise(x + image * size, taps, nullptr, t + image * size, height, width, c);
        if (mean) add_statistics(t + image * size, 2 * height * width, c / 2, mean, m2, 2L * image * height * width);
    }
}

// dz becomes the gradient of t; dx = dy + its depthwise convolution with flipped taps; dw (3, 3, c)
void depthwise_backward(const float* x, const float* t, float* dz, const float* dy, float* dx, const float* flipped,
                        int n, int height, int width, int c, const float* scale, const float* mean, const float* a,
                        const float* b, double* dw) {
    long size = (long)height * width * c;
    for (int image = 0; image < n; image++) {
        float* d = dz + image * size;
        const float* p = t + image * size;
        bn_backward(p, d, 2L * height * width, c / 2, scale, mean, a, b);
        depthwise(d, flipped, dy + image * size, dx + image * size, height, width, c);
        add_depthwise_weight_gradient(x + image * size, d, height, width, c, dw);
    }
}

void block_forward(const float* x, const float* t, float* y, long rows, int c, const float* scale, const float* shift,
                   const float* wv, const float* wg, const float* wo) {
    switch (c) {
        case 64: return block_forward_<32>(x, t, y, rows, scale, shift, wv, wg, wo);
        case 48: return block_forward_<24>(x, t, y, rows, scale, shift, wv, wg, wo);
        case 32: return block_forward_<16>(x, t, y, rows, scale, shift, wv, wg, wo);
        case 16: return block_forward_<8>(x, t, y, rows, scale, shift, wv, wg, wo);
    }
}

void block_backward(const float* t, const float* dy, float* dz, long rows, int c, const float* scale,
                    const float* shift, const float* mean, const float* wv, const float* wg, const float* wvt,
                    const float* wgt, const float* wot, double* dw, double* sum, double* dot) {
    switch (c) {
        case 64: return block_backward_<32>(t, dy, dz, rows, scale, shift, mean, wv, wg, wvt, wgt, wot, dw, sum, dot);
        case 48: return block_backward_<24>(t, dy, dz, rows, scale, shift, mean, wv, wg, wvt, wgt, wot, dw, sum, dot);
        case 32: return block_backward_<16>(t, dy, dz, rows, scale, shift, mean, wv, wg, wvt, wgt, wot, dw, sum, dot);
        case 16: return block_backward_<8>(t, dy, dz, rows, scale, shift, mean, wv, wg, wvt, wgt, wot, dw, sum, dot);
    }
}

}
