// Creates tensors, makes them contiguous, runs loops over their rows in parallel.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <exception>
#include <string>
#include <vector>

namespace eefast {

using torch::stable::Tensor;

// torch::stable::empty looks its op up by name in every call, which costs more than a kernel for one sample.
// Throws where there is no memory for it; `name` says for what.
Tensor empty(const char* name, const std::vector<int64_t>& sizes, int32_t dtype, int32_t device_type, int32_t device);

Tensor as_contiguous(const char* name, const Tensor& tensor);

// work(begin, end) for parts of [0, n). That of torch turns what a thread throws into another error, prints it and,
// before 2.13, loses its message; here the first one is rethrown unchanged, when all threads are done.
template <class Work>
void parallel_for(int64_t n, int64_t grain, const Work& work) {
  std::atomic_flag failed = ATOMIC_FLAG_INIT;
  std::exception_ptr error;
  torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) {
    try {
      work(begin, end);
    } catch (...) {
      if (!failed.test_and_set()) error = std::current_exception();
    }
  });
  if (error) std::rethrow_exception(error);
}

// "cpu", "cuda:0", …
std::string device_name(const Tensor& tensor);

}  // namespace eefast
