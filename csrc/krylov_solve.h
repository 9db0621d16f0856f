// The adjoint's Krylov solve as Python sees it: addresses of vectors that Python allocates; what is small lies here.
// Included by bindings.cpp alone.
#pragma once
#include <memory>
#include <stdexcept>
#include <vector>

#include "krylov.h"
#include "ring.h"

namespace pydeqsolve {
namespace {

class KrylovSolve {
 public:
  KrylovSolve(bool is_double, std::int64_t B, std::int64_t N, double eps, Address g)
      : is_double_(is_double), B_(B), N_(N), eps_(eps), g_(g), samples_(static_cast<std::size_t>(B)) {
    if (B < 0 || N < 1) throw std::invalid_argument("sizes out of range");
    check(g, "g");
  }

  std::int64_t begin(Address mask, double rtol, double atol, Address rtols, Address atols, double eps, Address q0,
                     int threads) {
    check(q0, "q_0");
    vectors_.assign(1, q0);
    return run([&](const auto& passes, const auto& c, auto scalar) {
      using S = decltype(scalar);
      return passes.begin(c, at<const std::uint8_t>(mask),
                          {rtol, atol, at<const double>(rtols), at<const double>(atols), eps}, at<S>(q0), threads);
    });
  }

  // next: where q_{k+1} goes, (B, N). It is a vector of the cycle from then on.
  std::int64_t append(Address product, Address next, int threads) {
    check(product, "a product");
    check(next, "the next vector");
    if (vectors_.empty()) throw std::invalid_argument("begin first");
    const int k = static_cast<int>(vectors_.size()) - 1;
    if (columns_.size() < vectors_.size()) columns_.emplace_back(new double[static_cast<std::size_t>(B_ * (k + 4))]);
    const std::int64_t going = run([&](const auto& passes, const auto& c, auto scalar) {
      using S = decltype(scalar);
      return passes.append(c, k, at<const S>(product), at<S>(next), threads);
    });
    vectors_.push_back(next);
    return going;
  }

  std::int64_t combine(bool cautious, Address u, Address out, int threads) {
    check(out, "the next u");
    return run([&](const auto& passes, const auto& c, auto scalar) {
      using S = decltype(scalar);
      return passes.combine(c, cautious, at<const S>(u), at<S>(out), threads);
    });
  }

  std::int64_t accept(Address u1, Address product1, Address u2, Address product2, Address u, int threads) {
    check(u1, "u_1");
    check(product1, "a product");
    check(product2, "a product", u2 != 0);
    check(u, "u");
    if (vectors_.empty()) throw std::invalid_argument("begin first");
    vectors_.resize(1);
    return run([&](const auto& passes, const auto& c, auto scalar) {
      using S = decltype(scalar);
      return passes.accept(c, at<const S>(u1), at<const S>(product1), at<const S>(u2), at<const S>(product2), at<S>(u),
                           at<S>(vectors_[0]), threads);
    });
  }

  std::int64_t raise(Address u, int threads) {
    check(u, "u");
    return run([&](const auto& passes, const auto& c, auto scalar) {
      return passes.raise(c, at<decltype(scalar)>(u), threads);
    });
  }
  std::int64_t lower(Address values, Address raised, int threads) {
    check(values, "values");
    return run([&](const auto& passes, const auto& c, auto scalar) {
      using S = decltype(scalar);
      return passes.lower(c, at<S>(values), at<const S>(raised), threads);
    });
  }
  void remeasure(Address u, Address product, int threads) {
    check(u, "u");
    check(product, "a product");
    run([&](const auto& passes, const auto& c, auto scalar) {
      using S = decltype(scalar);
      passes.remeasure(c, at<const S>(u), at<const S>(product), threads);
      return std::int64_t{0};
    });
  }
  // out: g, scaled; pursued (B,) doubles: the residual that a method is to reach.
  void scale(Address out, Address pursued, int threads) {
    check(out, "the scaled g");
    check_address(at<void>(pursued), B_, "the residuals to reach");
    for (std::int64_t i = 0; i < B_; ++i) at<double>(pursued)[i] = samples_[static_cast<std::size_t>(i)].pursued;
    run([&](const auto& passes, const auto& c, auto scalar) {
      passes.scale(c, at<decltype(scalar)>(out), threads);
      return std::int64_t{0};
    });
  }
  // u, with its product after `calls` of them, or with what a method says of each sample.
  void settle(Address u, Address product, std::int64_t calls, Address residual, Address evaluations, Address status,
              int threads) {
    check(u, "u");
    check(product, "a product", residual == 0);
    check_address(at<void>(evaluations), residual ? B_ : 0, "evaluations");
    check_address(at<void>(status), residual ? B_ : 0, "status");
    const KrylovTold told{at<const double>(residual), at<const std::int64_t>(evaluations),
                          at<const std::int64_t>(status), calls};
    run([&](const auto& passes, const auto& c, auto scalar) {
      using S = decltype(scalar);
      passes.settle(c, at<const S>(u), at<const S>(product), told, threads);
      return std::int64_t{0};
    });
  }
  std::int64_t judge(bool adjoint, bool follows, double eps, Address status, Address residual, Address evaluations) {
    check(status, "status");
    check(residual, "residual");
    check(evaluations, "evaluations");
    return judge_krylov(B_, samples_.data(), {adjoint, follows, eps}, at<std::int64_t>(status), at<double>(residual),
                        at<std::int64_t>(evaluations));
  }

 private:
  void check(Address first, const char* name, bool needed = true) const {
    check_address(at<void>(first), needed ? B_ * N_ : 0, name);
  }

  template <class Scalar>
  Krylov<Scalar> state(std::vector<double*>& columns) const {
    for (const auto& column : columns_) columns.push_back(column.get());
    return {B_,
            N_,
            eps_,
            at<const Scalar>(g_),
            const_cast<KrylovSample*>(samples_.data()),
            reinterpret_cast<Scalar* const*>(vectors_.data()),
            columns.data()};
  }
  template <class Pass>
  std::int64_t run(const Pass& pass) {
    std::vector<double*> columns;
    if (is_double_) return pass(krylov_passes<double>(), state<double>(columns), double{});
    return pass(krylov_passes<float>(), state<float>(columns), float{});
  }

  bool is_double_;
  std::int64_t B_, N_;
  double eps_;
  Address g_;
  std::vector<KrylovSample> samples_;
  std::vector<Address> vectors_;
  std::vector<std::unique_ptr<double[]>> columns_;
};

}  // namespace
}  // namespace pydeqsolve
