// Adjoint systems of a few unknowns as Python sees them. Included by bindings.cpp alone.
#pragma once
#include <stdexcept>

#include "ring.h"
#include "small.h"

namespace pydeqsolve {
namespace {

class SmallSolve {
 public:
  SmallSolve(bool is_double, std::int64_t B, int N, double eps, Address g, Address mask, double rtol, double atol,
             Address rtols, Address atols, double resolved, int threads)
      : is_double_(is_double),
        B_(B),
        N_(N),
        eps_(eps),
        g_(g),
        mask_(mask),
        asked_{rtol, atol, at<const double>(rtols), at<const double>(atols), resolved},
        threads_(threads) {
    if (B < 0 || N < 1 || N > kMostUnknowns) throw std::invalid_argument("sizes out of range");
    check(g, N, "g");
  }

  std::int64_t active() const {
    return with([](const auto& c, auto) { return small_active(c); });
  }
  void column(int j, Address product, Address matrix) const {
    if (j < 0 || j >= N_) throw std::invalid_argument("column out of range");
    check(product, N_, "a product");
    check(matrix, N_ * N_, "the matrices");
    with([&](const auto& c, auto s) {
      using S = decltype(s);
      small_column(c, j, at<const S>(product), at<S>(matrix));
      return std::int64_t{0};
    });
  }
  void solve(Address matrix, Address u, Address unmet) const {
    check(matrix, N_ * N_, "the matrices");
    check(u, N_, "u");
    check(unmet, 1, "unmet");
    with([&](const auto& c, auto s) {
      using S = decltype(s);
      small_solve(c, at<const S>(matrix), at<S>(u), at<bool>(unmet));
      return std::int64_t{0};
    });
  }
  std::int64_t measure(Address u, Address product, Address unmet) const {
    check(u, N_, "u");
    check(product, N_, "a product");
    check(unmet, 1, "unmet");
    return with([&](const auto& c, auto s) {
      using S = decltype(s);
      return small_measure(c, at<const S>(u), at<const S>(product), at<bool>(unmet));
    });
  }
  std::int64_t judge(Address u, Address product, Address unmet, bool adjoint, bool follows, double eps, int evaluations,
                     Address status, Address residual, Address counts) const {
    check(u, N_, "u");
    check(product, N_, "a product");
    for (const Address one : {unmet, status, residual, counts}) check(one, 1, "the outcome");
    return with([&](const auto& c, auto s) {
      using S = decltype(s);
      return small_judge(c, at<const S>(u), at<const S>(product), at<const bool>(unmet), {adjoint, follows, eps},
                         evaluations, at<std::int64_t>(status), at<double>(residual), at<std::int64_t>(counts));
    });
  }
  void raise(Address u) const {
    check(u, N_, "u");
    with([&](const auto& c, auto s) {
      small_raise(c, at<decltype(s)>(u));
      return std::int64_t{0};
    });
  }
  void lower(Address values, Address unmet) const {
    check(values, N_, "values");
    check(unmet, 1, "unmet");
    with([&](const auto& c, auto s) {
      small_lower(c, at<decltype(s)>(values), at<bool>(unmet));
      return std::int64_t{0};
    });
  }

 private:
  void check(Address first, int entries, const char* name) const { check_address(at<void>(first), B_ * entries, name); }
  template <class Body>
  std::int64_t with(const Body& body) const {
    const auto* const mask = at<const std::uint8_t>(mask_);
    if (is_double_) return body(Small<double>{B_, N_, eps_, at<const double>(g_), mask, asked_, threads_}, double{});
    return body(Small<float>{B_, N_, eps_, at<const float>(g_), mask, asked_, threads_}, float{});
  }

  bool is_double_;
  std::int64_t B_;
  int N_;
  double eps_;
  Address g_, mask_;
  KrylovTolerance asked_;
  int threads_;
};

}  // namespace
}  // namespace pydeqsolve
