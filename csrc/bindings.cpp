// The extension module fastllm._kernels: picks the table for this processor and calls it on raw
// addresses. Device, dtype, shape and strides were checked in Python; the GIL is released.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"

namespace py = pybind11;
using namespace fastllm;

namespace {

// Every table that this processor can run, slowest first.
std::vector<const Kernels*> runnable_tables() {
    std::vector<const Kernels*> tables = {&kernels_base};
#ifdef FASTLLM_X86_TABLES
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vl");
    if (avx2) tables.push_back(&kernels_avx2);
    if (avx512) tables.push_back(&kernels_avx512);
    if (avx512 && __builtin_cpu_supports("avx512bf16")) tables.push_back(&kernels_avx512_bf16);
#endif
    return tables;
}

const std::vector<const Kernels*> tables = runnable_tables();
const Kernels* kernels = tables.back();

std::vector<std::string> isas() {
    std::vector<std::string> names;
    for (const Kernels* table : tables) names.push_back(table->isa);
    return names;
}

void set_isa(const std::string& isa) {
    std::string names;
    for (const Kernels* table : tables) {
        if (isa == table->isa) {
            kernels = table;
            return;
        }
        names += std::string(names.empty() ? "" : ", ") + table->isa;
    }
    throw std::invalid_argument("this CPU has no kernels for the instruction set '" + isa +
                                "'; it can run: " + names);
}

template <typename T>
T* at(uint64_t address) {
    return reinterpret_cast<T*>(address);
}

// lr, beta1, beta2, eps, weight_decay
using AdamSettings = std::array<double, 5>;
// param, grad, exp_avg, exp_avg_sq, step, size, index into the settings
using AdamRow = std::array<uint64_t, 7>;

double adam_step(const std::vector<AdamRow>& rows, const std::vector<AdamSettings>& settings,
                 bool decoupled_weight_decay, double max_grad_norm, int threads) {
    std::vector<AdamTensor> tensors;
    tensors.reserve(rows.size());
    int64_t blocks = 0;
    for (const auto& [param, grad, exp_avg, exp_avg_sq, step, size, group] : rows) {
        const auto& [lr, beta1, beta2, eps, weight_decay] = settings.at(group);
        tensors.push_back({at<float>(param), at<const float>(grad), at<float>(exp_avg),
                           at<float>(exp_avg_sq), at<float>(step), static_cast<int64_t>(size),
                           blocks, lr, beta1, beta2, eps, weight_decay, 0, 0});
        blocks += (static_cast<int64_t>(size) + ADAM_BLOCK - 1) / ADAM_BLOCK;
    }
    std::vector<double> block_sums(blocks);
    py::gil_scoped_release release;
    return kernels->adam_step(tensors.data(), tensors.size(), block_sums.data(), blocks,
                              decoupled_weight_decay, max_grad_norm, threads);
}

}  // namespace

PYBIND11_MODULE(_kernels, m) {
    m.doc() = "fastllm's CPU kernels on raw addresses; see csrc/kernels.h.";
    m.def("isas", isas, "The instruction sets with kernels that this CPU can run, slowest first.");
    m.def("isa", [] { return kernels->isa; }, "The instruction set in use.");
    m.def("set_isa", set_isa, py::arg("isa"));
    m.def("adam_step", adam_step, py::arg("rows"), py::arg("settings"),
          py::arg("decoupled_weight_decay"), py::arg("max_grad_norm"), py::arg("threads"));
    m.def(
        "dropout",
        [](uint64_t out, uint64_t in, int64_t size, double p, uint64_t seed, uint32_t stream,
           int threads) {
            kernels->dropout(at<float>(out), at<const float>(in), size, p, {seed, stream}, threads);
        },
        py::arg("out"), py::arg("in"), py::arg("size"), py::arg("p"), py::arg("seed"),
        py::arg("stream"), py::arg("threads"), py::call_guard<py::gil_scoped_release>());
    m.def(
        "fma_loop",
        [](int64_t iterations, int threads) { return kernels->fma_loop(iterations, threads); },
        py::arg("iterations"), py::arg("threads"), py::call_guard<py::gil_scoped_release>());
    m.def(
        "memory_read",
        [](uint64_t data, int64_t size, int threads) {
            return kernels->memory_read(at<const float>(data), size, threads);
        },
        py::arg("data"), py::arg("size"), py::arg("threads"),
        py::call_guard<py::gil_scoped_release>());
    m.def(
        "memory_update",
        [](uint64_t data, int64_t size, int threads) {
            kernels->memory_update(at<float>(data), size, threads);
        },
        py::arg("data"), py::arg("size"), py::arg("threads"),
        py::call_guard<py::gil_scoped_release>());
}
