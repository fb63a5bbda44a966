/* Scan operations over sequences of tokens, one pass each from the right. Compiled by scan_compiled.py, once with
 * REAL=float and once with REAL=double; plain C without any header of Python or PyTorch.
 *
 * Sequence i holds the tokens cu_seqlens[i] … cu_seqlens[i + 1] - 1 or, without cu_seqlens, row i of [sequences, length].
 * Strides are of rows, in elements; tokens of a row are adjacent. Absent inputs are NULL. Outputs are contiguous.
 * Every function works on the sequences first … last - 1, so that threads can share them.
 */
#include <math.h>
#include <stddef.h>
#include <stdint.h>

enum mode { SKIP, STOP, DENSE };
enum estimator { K1, K2, K3 };

static double token_kl(double d, int32_t estimator)
{
    if (estimator == K1)
        return d;
    if (estimator == K2)
        return 0.5 * d * d;
    if (fabs(d) < 1e-3) /* the form below loses a small d to rounding */
        return d * d * (0.5 - d / 6 + d * d / 24);
    return expm1(-d) + d;
}

void gae(const REAL *rewards, int64_t rewards_stride, const REAL *values, int64_t values_stride,
         const uint8_t *mask, int64_t mask_stride, const uint8_t *dones, int64_t dones_stride,
         const REAL *log_rho, int64_t log_rho_stride, const REAL *bootstrap, const int64_t *cu_seqlens, int64_t length,
         double gamma_, double lam, double rho_bar, double c_bar, int32_t mode,
         REAL *advantages, REAL *returns, int64_t first, int64_t last)
{
    const REAL gamma = (REAL)gamma_, rate = (REAL)(gamma_ * lam);
    for (int64_t i = first; i < last; i++) {
        const int64_t row = cu_seqlens ? 0 : i, lo = cu_seqlens ? cu_seqlens[i] : 0;
        const int64_t hi = cu_seqlens ? cu_seqlens[i + 1] : length;
        const REAL *r = rewards + row * rewards_stride, *v = values + row * values_stride;
        const uint8_t *m = mask ? mask + row * mask_stride : NULL, *end = dones ? dones + row * dones_stride : NULL;
        const REAL *ratio = log_rho ? log_rho + row * log_rho_stride : NULL;
        REAL *a = advantages + row * length, *g = returns + row * length;
        REAL next_value = bootstrap ? bootstrap[i] : 0, next_advantage = 0;
        int seen = 0; /* a step to the right */
        for (int64_t t = hi - 1; t >= lo; t--) {
            const int counted = !m || m[t];
            if (!counted && mode != DENSE) {
                if (mode == STOP && seen)
                    next_value = next_advantage = 0;
                a[t] = g[t] = 0;
                continue;
            }
            seen = 1;
            if (end && end[t])
                next_value = next_advantage = 0;
            REAL delta = r[t] + gamma * next_value - v[t], decay = rate;
            if (ratio) {
                const double rho = exp((double)ratio[t]);
                delta *= (REAL)(rho > rho_bar ? rho_bar : rho); /* this way round a NaN stays */
                decay *= (REAL)(rho > c_bar ? c_bar : rho);
            }
            next_advantage = delta + decay * next_advantage;
            next_value = v[t];
            a[t] = counted ? next_advantage : 0;
            g[t] = counted ? next_advantage + next_value : 0;
        }
    }
}

void shaped(const REAL *logp, int64_t logp_stride, const REAL *ref_logp, int64_t ref_logp_stride,
            const REAL *values, int64_t values_stride, const uint8_t *mask, int64_t mask_stride,
            const REAL *scores, const REAL *bootstrap, const int64_t *cu_seqlens, int64_t length,
            double kl_coef, double score_clip, double gamma_, double lam, int32_t estimator,
            REAL *advantages, REAL *returns, REAL *rewards, REAL *kl_sum, REAL *partials, int64_t first, int64_t last)
{
    const REAL gamma = (REAL)gamma_, rate = (REAL)(gamma_ * lam), clip = (REAL)score_clip;
    for (int64_t i = first; i < last; i++) {
        const int64_t row = cu_seqlens ? 0 : i, lo = cu_seqlens ? cu_seqlens[i] : 0;
        const int64_t hi = cu_seqlens ? cu_seqlens[i + 1] : length;
        const REAL *policy = logp + row * logp_stride, *reference = ref_logp + row * ref_logp_stride;
        const REAL *v = values + row * values_stride;
        const uint8_t *m = mask + row * mask_stride;
        REAL *a = advantages + row * length, *g = returns + row * length, *r = rewards + row * length;
        REAL next_value = bootstrap ? bootstrap[i] : 0, next_advantage = 0;
        REAL score = scores[i] > clip ? clip : scores[i] < -clip ? -clip : scores[i]; /* a NaN stays */
        double kl_total = 0, total = 0, squares = 0;
        int64_t count = 0;
        for (int64_t t = hi - 1; t >= lo; t--) {
            if (!m[t]) {
                a[t] = g[t] = r[t] = 0;
                continue;
            }
            const double kl = token_kl((double)policy[t] - (double)reference[t], estimator);
            const REAL reward = score - (REAL)(kl_coef * kl);
            score = 0; /* it belongs to the last token alone */
            next_advantage = reward + gamma * next_value - v[t] + rate * next_advantage;
            next_value = v[t];
            a[t] = next_advantage;
            g[t] = next_advantage + next_value;
            r[t] = reward;
            kl_total += kl;
            total += (double)next_advantage;
            count++;
        }
        const double mean = count ? total / (double)count : 0;
        for (int64_t t = lo; t < hi; t++) {
            const double from_mean = m[t] ? (double)a[t] - mean : 0;
            squares += from_mean * from_mean;
        }
        kl_sum[i] = (REAL)kl_total;
        partials[3 * i] = (REAL)count;
        partials[3 * i + 1] = (REAL)mean;
        partials[3 * i + 2] = (REAL)squares;
    }
}

/* Whitens the tokens first … last - 1 by count, mean and squares [parts][3] of all of them, if asked to, and leaves their
 * mean and biased variance. Every thread merges the parts for itself, in the same order (Chan, Golub & LeVeque 1979). */
void whiten(REAL *values, const uint8_t *mask, const REAL *partials, int64_t parts, int32_t wanted, int32_t shift_mean,
            REAL *stats, int64_t first, int64_t last)
{
    double count = 0, sum = 0, squares = 0;
    for (int64_t i = 0; i < parts; i++) {
        count += (double)partials[3 * i];
        sum += (double)partials[3 * i] * (double)partials[3 * i + 1];
    }
    const double mean = sum / (count > 1 ? count : 1);
    for (int64_t i = 0; i < parts; i++) {
        const double gap = (double)partials[3 * i + 1] - mean;
        squares += (double)partials[3 * i + 2] + (double)partials[3 * i] * gap * gap;
    }
    const double var = squares / (count > 1 ? count : 1);
    if (first == 0) {
        stats[0] = (REAL)mean;
        stats[1] = (REAL)var;
    }
    if (!wanted || count < 2) /* one value has no spread: it stays as it is */
        return;
    const REAL shift = (REAL)mean, scale = (REAL)(1 / sqrt(var + 1e-8)), back = shift_mean ? 0 : shift;
    for (int64_t t = first; t < last; t++)
        values[t] = mask[t] ? (values[t] - shift) * scale + back : 0;
}
