// The C++ implementations of the ops whose schemas and references are in eefast/ops; bind*.cpp registers them.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>

namespace eefast {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor, Tensor> exit_head(const Tensor& features, const Tensor& weight, const Tensor& bias,
                                             const std::optional<Tensor>& threshold, const Tensor& rows,
                                             const Tensor& positions, const Tensor& live, const std::string& criterion,
                                             int64_t exit_index, const Tensor& logits, const Tensor& confidence,
                                             const Tensor& exits, const std::optional<Tensor>& rule);

std::tuple<Tensor, Tensor, Tensor> exit_head_cuda(const Tensor& features, const Tensor& weight, const Tensor& bias,
                                                  const std::optional<Tensor>& threshold, const Tensor& rows,
                                                  const Tensor& positions, const Tensor& live,
                                                  const std::string& criterion, int64_t exit_index,
                                                  const Tensor& logits, const Tensor& confidence, const Tensor& exits,
                                                  const std::optional<Tensor>& rule);

void gather_survivors(const Tensor& features, const Tensor& rows, const Tensor& live, const Tensor& out,
                      const std::optional<Tensor>& offset);

void gather_survivors_cuda(const Tensor& features, const Tensor& rows, const Tensor& live, const Tensor& out,
                           const std::optional<Tensor>& offset);

std::tuple<Tensor, Tensor, Tensor> resident_forward(
    const Tensor& images, const Tensor& steps, const Tensor& maps, const Tensor& groups, const Tensor& weights,
    const Tensor& packed, const Tensor& thresholds, const std::string& criterion, int64_t num_classes, bool bfloat16,
    int64_t threads, const std::optional<Tensor>& seconds, const std::optional<Tensor>& normalization,
    const std::optional<Tensor>& rule, const std::optional<Tensor>& features, const std::optional<Tensor>& before);

std::tuple<Tensor, Tensor, Tensor> resident_int8(
    const Tensor& images, const Tensor& steps, const Tensor& maps, const Tensor& groups, const Tensor& weights,
    const Tensor& packed, const Tensor& thresholds, const Tensor& image, const std::string& criterion,
    int64_t num_classes, int64_t threads, const std::optional<Tensor>& seconds, const std::optional<Tensor>& rule,
    const std::optional<Tensor>& features, const std::optional<Tensor>& before);

std::tuple<Tensor, Tensor, Tensor> resident_forward_cuda(
    const Tensor& images, const Tensor& steps, const Tensor& maps, const Tensor& groups, const Tensor& weights,
    const Tensor& packed, const Tensor& thresholds, const std::string& criterion, int64_t num_classes, bool bfloat16,
    int64_t threads, const std::optional<Tensor>& seconds, const std::optional<Tensor>& normalization,
    const std::optional<Tensor>& rule, const std::optional<Tensor>& features, const std::optional<Tensor>& before);

// The network as the CUDA kernel takes it, `cuda::Network` in bytes, and the shared memory that a block of it needs:
// for plans, and for tests that run the kernel elsewhere.
std::tuple<Tensor, int64_t> resident_network(const Tensor& images, const Tensor& steps, const Tensor& maps,
                                             const Tensor& groups, const Tensor& packed, const Tensor& thresholds,
                                             const std::string& criterion, int64_t num_classes, bool bfloat16,
                                             const std::optional<Tensor>& rule);

// See eefast/ops/resident_loop.py.
int64_t resident_loop_open(const Tensor& images, const Tensor& steps, const Tensor& maps, const Tensor& groups,
                           const Tensor& packed, const Tensor& thresholds, const std::string& criterion,
                           int64_t num_classes, bool bfloat16, const std::optional<Tensor>& image,
                           const std::optional<Tensor>& rule, int64_t workers, const Tensor& counts);
void resident_loop_put(int64_t loop, const Tensor& images, const Tensor& limits, int64_t ticket, double arrived,
                       double deadline);
std::tuple<Tensor, Tensor> resident_loop_take(int64_t loop, double delay);
void resident_loop_cancel(int64_t loop, int64_t ticket);
void resident_loop_close(int64_t loop, bool drop);
void resident_loop_free(int64_t loop);

// "portable", "avx2", "avx512" or "avx512_bf16": what the CPU kernels use here.
std::string instruction_set();
// "portable", "avx2", "avx_vnni" or "avx512_vnni": what the int8 kernels use.
std::string int8_instruction_set();

}  // namespace eefast
