// smoothquant._C: control of the kernels, and calls without the dispatcher. It takes no tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "../mixedquant.h"
#include "decoder.h"

namespace py = pybind11;

namespace {

std::vector<std::string> supported_isas() {
    std::vector<std::string> names;
    for (int isa = 0; isa < MQ_ISA_COUNT; isa++)
        if (mq_isa_supported(static_cast<mq_isa>(isa)))
            names.emplace_back(mq_isa_name(static_cast<mq_isa>(isa)));
    return names;
}

void set_isa(const std::string &name) {
    for (int isa = 0; isa < MQ_ISA_COUNT; isa++) {
        if (name != mq_isa_name(static_cast<mq_isa>(isa))) continue;
        if (mq_isa_set(static_cast<mq_isa>(isa)) == MQ_OK) return;
        throw std::runtime_error("this processor lacks the instruction set '" + name + "'");
    }
    std::string known;
    for (const auto &isa : supported_isas()) known += (known.empty() ? "" : ", ") + isa;
    throw py::value_error("unknown instruction set '" + name + "'; this processor has: " + known);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Control of MixedQuant's kernels: instruction sets and build information.";
    m.def("supported_isas", &supported_isas,
          "Instruction sets this processor has kernels for, the specification first.");
    m.def(
        "active_isa", [] { return std::string(mq_isa_name(mq_isa_active())); },
        "The instruction set in use.");
    m.def(
        "set_isa", &set_isa, py::arg("name"),
        "Force an instruction set; ValueError if unknown, RuntimeError if the processor lacks it.");
    m.def(
        "build_info",
        [] {
            py::dict info;
            info["compiler"] = MQ_BUILD_COMPILER;
            info["torch"] = MQ_BUILD_TORCH;
            info["cuda_archs"] = MQ_BUILD_CUDA_ARCHS;
            return info;
        },
        "Compiler, torch version and CUDA architectures ('' for none) of this build.");
    mixedquant::bind_decoder(m);
    mixedquant::bind_snapshot(m);
}
