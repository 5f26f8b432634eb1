// Fused float32 training kernels for one thread and channels_last memory: rows are pixels, c is the number of channels.
#include <immintrin.h>
#include <math.h>
#include <string.h>
#include <algorithm>

enum { CLAMP = 0, SILU = 1 };
static const int CHUNK = 256, MAX_C = 128;

static inline float sigmoid(float z) { return 1.0f / (1.0f + expf(-z)); }
static inline float activate(float z, int act) { return act == CLAMP ? fminf(fmaxf(z, -4.0f), 4.0f) : z * sigmoid(z); }
static inline float slope(float z, int act) {
    if (act == CLAMP) return fabsf(z) < 4.0f ? 1.0f : 0.0f;
    float s = sigmoid(z);
    return s * (1.0f + z * (1.0f - s));
}

extern "C" {

// vg (rows, 2c): values, then gates -> values * SiLU(gates)
void glu_forward(const float* vg, float* out, long rows, int c) {
    for (long r = 0; r < rows; r++) {
        const float *v = vg + r * 2 * c, *g = v + c;
        float* o = out + r * c;
#pragma GCC ivdep
        for (int i = 0; i < c; i++) o[i] = v[i] * activate(g[i], SILU);
    }
}

void glu_backward(const float* vg, const float* grad, float* out, long rows, int c) {
    for (long r = 0; r < rows; r++) {
        const float *v = vg + r * 2 * c, *g = v + c, *d = grad + r * c;
        float *dv = out + r * 2 * c, *dg = dv + c;
#pragma GCC ivdep
        for (int i = 0; i < c; i++) {
            float s = sigmoid(g[i]);
            dv[i] = d[i] * (g[i] * s);
            dg[i] = d[i] * v[i] * (s * (1.0f + g[i] * (1.0f - s)));
        }
    }
}

// mean and sum of squared deviations of each channel: exact in chunks, combined in double (Chan et al. 1979)
void bn_statistics(const float* x, long rows, int c, double* mean, double* m2) {
    memset(mean, 0, c * sizeof(double));
    memset(m2, 0, c * sizeof(double));
    for (long start = 0; start < rows; start += CHUNK) {
        long n = std::min<long>(CHUNK, rows - start);
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
            double delta = chunk_mean[i] - mean[i], total = start + n;
            mean[i] += delta * n / total;
            m2[i] += squares[i] + delta * delta * start * n / total;
        }
    }
}

// y = act(x * scale + shift)
void bn_act_forward(const float* x, float* y, long rows, int c, const float* scale, const float* shift, int act) {
    for (long r = 0; r < rows; r++)
#pragma GCC ivdep
        for (int i = 0; i < c; i++) y[r * c + i] = activate(x[r * c + i] * scale[i] + shift[i], act);
}

// sums of dz and dz * (x - mean), where dz is the gradient before the activation
void bn_act_backward_sums(const float* x, const float* dy, long rows, int c, const float* scale, const float* shift,
                          const float* mean, int act, double* sum, double* dot) {
    memset(sum, 0, c * sizeof(double));
    memset(dot, 0, c * sizeof(double));
    for (long start = 0; start < rows; start += CHUNK) {
        long n = std::min<long>(CHUNK, rows - start);
        float s[MAX_C] = {0}, d[MAX_C] = {0};
        for (long r = start; r < start + n; r++)
#pragma GCC ivdep
            for (int i = 0; i < c; i++) {
                float value = x[r * c + i], dz = dy[r * c + i] * slope(value * scale[i] + shift[i], act);
                s[i] += dz;
                d[i] += dz * (value - mean[i]);
            }
        for (int i = 0; i < c; i++) sum[i] += s[i], dot[i] += d[i];
    }
}

// dx = scale * dz - a - b * (x - mean)
void bn_act_backward(const float* x, const float* dy, float* dx, long rows, int c, const float* scale,
                     const float* shift, const float* mean, int act, const float* a, const float* b) {
    for (long r = 0; r < rows; r++)
#pragma GCC ivdep
        for (int i = 0; i < c; i++) {
            float value = x[r * c + i], dz = dy[r * c + i] * slope(value * scale[i] + shift[i], act);
            dx[r * c + i] = scale[i] * dz - a[i] - b[i] * (value - mean[i]);
        }
}

// gradient (3, 3, c) of the weight of a depthwise 3x3 convolution with padding 1; c is a multiple of 16, at most MAX_C
void depthwise_weight_gradient(const float* x, const float* grad, int n, int height, int width, int c, double* out) {
    memset(out, 0, 9 * c * sizeof(double));
    for (int image = 0; image < n; image++) {
        float total[9 * MAX_C] = {0};
        for (int h = 0; h < height; h++)
            for (int dh = std::max(-1, -h); dh <= std::min(1, height - 1 - h); dh++)
                for (int k = 0; k < c; k += 16) {
                    const float* g = grad + ((long)(image * height + h) * width) * c + k;
                    const float* p = x + ((long)(image * height + h + dh) * width) * c + k;
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
}

}
