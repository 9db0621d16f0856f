// The types in which states and their history are stored: double, float, and two of 16 bits, which every computation
// converts to float first. Plain bits, for host compilers and nvcc alike.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#endif

#if defined(__CUDACC__) || defined(PYDEQSOLVE_EMULATE_CUDA)
#define PYDEQSOLVE_HD __host__ __device__
#else
#define PYDEQSOLVE_HD
#endif

namespace pydeqsolve {

enum class Storage : int { kFloat64 = 0, kFloat32 = 1, kBFloat16 = 2, kFloat16 = 3 };

PYDEQSOLVE_HD static inline std::uint32_t bits_of(float x) {
  std::uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
PYDEQSOLVE_HD static inline float float_of(std::uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// The upper half of a float. From float: to nearest, ties to even; NaN stays NaN.
struct BFloat16 {
  std::uint16_t bits;

  BFloat16() = default;
  PYDEQSOLVE_HD explicit BFloat16(float x) {
    const std::uint32_t b = bits_of(x);
    const bool is_nan = (b & 0x7fffffffu) > 0x7f800000u;
    bits = static_cast<std::uint16_t>(is_nan ? (b >> 16) | 0x40u : (b + 0x7fffu + ((b >> 16) & 1u)) >> 16);
  }
  PYDEQSOLVE_HD explicit operator float() const { return float_of(std::uint32_t{bits} << 16); }
};

// IEEE 754 binary16, subnormals included. From float: to nearest, ties to even; NaN stays NaN.
struct Half {
  std::uint16_t bits;

  Half() = default;
#if defined(__CUDA_ARCH__)
  __device__ explicit Half(float x) : bits(__half_as_ushort(__float2half_rn(x))) {}
  __device__ explicit operator float() const { return __half2float(__ushort_as_half(bits)); }
#else
  PYDEQSOLVE_HD explicit Half(float x) {
    const std::uint32_t b = bits_of(x), sign = (b >> 16) & 0x8000u, size = b & 0x7fffffffu;
    std::uint32_t half;
    if (size > 0x7f800000u) {
      half = 0x7e00u | ((size >> 13) & 0x3ffu);
    } else if (size >= 0x47800000u) {  // 2^16 and more
      half = 0x7c00u;
    } else if (size >= 0x38800000u) {  // 2^-14 and more: a carry out of the fraction goes to the exponent, as it must
      half = (size + 0xfffu + ((size >> 13) & 1u) - 0x38000000u) >> 13;
    } else {  // adding a half lets the processor round to a multiple of 2^-24, the last bit of 1/2 as a float
      half = bits_of(float_of(size) + 0.5f) - 0x3f000000u;
    }
    bits = static_cast<std::uint16_t>(sign | half);
  }
  PYDEQSOLVE_HD explicit operator float() const {
    const std::uint32_t sign = (bits & 0x8000u) << 16, size = bits & 0x7fffu;
    if (size >= 0x7c00u) return float_of(sign | 0x7f800000u | (size & 0x3ffu) << 13);
    if (size >= 0x400u) return float_of(sign | ((size << 13) + 0x38000000u));
    return float_of(sign | bits_of(static_cast<float>(size) * 0x1p-24f));
  }
#endif
};

// The largest finite number of a 16-bit type.
template <class Scalar>
constexpr float kLargest = std::is_same_v<Scalar, Half> ? 65504.0f : 0x1.fep127f;

// What arithmetic on a Scalar is done in.
template <class Scalar>
struct Arithmetic {
  using type = float;
};
template <>
struct Arithmetic<double> {
  using type = double;
};
template <class Scalar>
using Wide = typename Arithmetic<Scalar>::type;

template <class Scalar>
constexpr Storage kStorage = std::is_same_v<Scalar, double>     ? Storage::kFloat64
                             : std::is_same_v<Scalar, float>    ? Storage::kFloat32
                             : std::is_same_v<Scalar, BFloat16> ? Storage::kBFloat16
                                                                : Storage::kFloat16;

PYDEQSOLVE_HD static inline int bytes_of(Storage storage) {
  return storage == Storage::kFloat64 ? 8 : storage == Storage::kFloat32 ? 4 : 2;
}

// body(Scalar{}), the type in which `storage` keeps a state.
template <class Body>
static inline void with_scalar(Storage storage, const Body& body) {
  switch (storage) {
    case Storage::kFloat64:
      return body(double{});
    case Storage::kFloat32:
      return body(float{});
    case Storage::kBFloat16:
      return body(BFloat16{});
    case Storage::kFloat16:
      return body(Half{});
  }
}

// A residual as the ring keeps it, rounded to the storage type; one beyond the range of a 16-bit type is kept at its
// largest: a difference of two of float16, or one of float that bfloat16 would round up to infinity. The residual of a
// value that is itself infinite is kept so too, and its norm says what it was.
template <class Scalar>
PYDEQSOLVE_HD static inline Scalar kept(Wide<Scalar> r) {
  if constexpr (sizeof(Scalar) == 2) {
    r = r > kLargest<Scalar> ? kLargest<Scalar> : r < -kLargest<Scalar> ? -kLargest<Scalar> : r;
  }
  return static_cast<Scalar>(r);
}

}  // namespace pydeqsolve
