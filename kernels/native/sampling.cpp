// One token per row, drawn from the tokens that top_k, top_p and min_p keep; `sampling.py` defines these filters.
//
// The filters and the draw need only the most likely tokens, usually few of many. So one pass puts the tokens into bins
// of s = (largest logit - logit) / temperature and sums exp(-s), and bins are sorted in order only as far as a filter
// or the draw needs them.

#include <algorithm>
#include <cmath>
#include <vector>

#include "exponential.h"

namespace afnext {
namespace {

constexpr float kRange = 32;  // tokens with a larger s are never drawn, see sampling.py
constexpr int kBins = 256;

// The tokens of a row within the range, the most likely first; equal ones by id.
class Descending {
 public:
  Descending(const float* logits, int64_t vocab, float temperature) : logits_(logits), temperature_(temperature) {
    Vec most = splat(-INFINITY);
    for_vectors(vocab, [&](int64_t, int, Vec x) { most = x > most ? x : most; });
    top_ = largest(most);
    std::vector<uint16_t> bin_of(vocab);
    double masses[kBins + 1] = {};
    for_vectors(vocab, [&](int64_t first, int count, Vec x) {
      const Vec s = (top_ - x) / temperature;
      const IntVec bins = to_int(s < kRange ? s * (kBins / kRange) : splat(kBins));
      const Vec e = exp2(s * -1.44269504f);
      for (int i = 0; i < count; ++i) {
        bin_of[first + i] = (uint16_t)bins[i];
        ++end_[bins[i]];
        masses[bins[i]] += e[i];
      }
    });
    int64_t before = 0;
    for (int bin = 0; bin < kBins; ++bin) {
      mass_ += masses[bin];
      std::swap(before, end_[bin]);
      before += end_[bin];
    }
    tokens_.resize(count_ = before);
    for (int64_t token = 0; token < vocab; ++token)
      if (bin_of[token] < kBins) tokens_[end_[bin_of[token]]++] = (int32_t)token;
  }

  int64_t count() const { return count_; }
  double mass() const { return mass_; }  // of all tokens; that of the most likely one is 1

  // The mass of the tokens up to rank `rank`.
  double through(int64_t rank) {
    while ((int64_t)through_.size() <= rank) sort_next_bin();
    return through_[rank];
  }

  // For a rank that `through` has reached.
  double mass_of(int64_t rank) const { return std::exp(((double)logits_[tokens_[rank]] - top_) / temperature_); }
  int64_t token(int64_t rank) const { return tokens_[rank]; }

 private:
  // Calls body(first, count, x) for the logits from index `first` on: `count` lanes of x are valid, the others -inf.
  template <typename Body>
  void for_vectors(int64_t vocab, Body body) const {
    int64_t first = 0;
    for (; first + kLanes <= vocab; first += kLanes) body(first, kLanes, load(logits_ + first));
    if (first == vocab) return;
    float rest[kLanes];
    std::fill(rest, rest + kLanes, -INFINITY);
    std::copy(logits_ + first, logits_ + vocab, rest);
    body(first, (int)(vocab - first), load(rest));
  }

  void sort_next_bin() {
    const int64_t begin = (int64_t)through_.size();
    std::sort(tokens_.begin() + begin, tokens_.begin() + end_[next_],
              [&](int32_t a, int32_t b) { return logits_[a] > logits_[b] || (logits_[a] == logits_[b] && a < b); });
    double total = begin ? through_.back() : 0;
    for (int64_t rank = begin; rank < end_[next_]; ++rank) through_.push_back(total += mass_of(rank));
    ++next_;
  }

  const float* logits_;
  float temperature_, top_;
  int64_t count_, end_[kBins + 1] = {};  // where each bin ends in tokens_
  double mass_ = 0;
  std::vector<int32_t> tokens_;
  std::vector<double> through_;  // of the tokens sorted so far
  int next_ = 0;
};

int64_t draw(Descending tokens, int64_t top_k, float top_p, float min_p, float uniform) {
  int64_t kept = tokens.count();
  double mass = tokens.mass();
  // Keeps the tokens up to the first for which is_last is true.
  const auto keep_through = [&](auto is_last) {
    int64_t rank = 0;
    while (rank + 1 < kept && !is_last(rank)) ++rank;
    kept = rank + 1;
    mass = tokens.through(rank);
  };
  if (kept == 0) return 0;
  if (top_k > 0 && top_k < kept) {
    kept = top_k;
    mass = tokens.through(kept - 1);
  }
  if (top_p < 1) keep_through([&, wanted = top_p * mass](int64_t rank) { return tokens.through(rank) >= wanted; });
  if (min_p > 0)
    keep_through([&](int64_t rank) {
      tokens.through(rank + 1);
      return tokens.mass_of(rank + 1) < min_p;
    });
  keep_through([&, wanted = uniform * mass](int64_t rank) { return tokens.through(rank) > wanted; });
  return tokens.token(kept - 1);
}

}  // namespace
}  // namespace afnext

// logits: [batch, vocab] float32, its rows `stride` apart; temperature, top_p, min_p, uniform: [batch] float32; top_k, out:
// [batch] int64. A row without any logit above -inf gives 0.
AFNEXT_EXPORT void afnext_sample(const float* logits, const float* temperature, const int64_t* top_k,
                                 const float* top_p, const float* min_p, const float* uniform, int64_t* out,
                                 int64_t batch, int64_t vocab, int64_t stride, int64_t threads) {
  using namespace afnext;
#pragma omp parallel for num_threads(threads) if (batch > 1) schedule(dynamic)
  for (int64_t row = 0; row < batch; ++row)
    out[row] = draw(Descending(logits + row * stride, vocab, temperature[row]), top_k[row], top_p[row], min_p[row],
                    uniform[row]);
}
