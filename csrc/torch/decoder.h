// Adds the parts of a decoder layer, and what tells whether it is still the same, to smoothquant._C.
#ifndef MQ_TORCH_DECODER_H
#define MQ_TORCH_DECODER_H

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

namespace mixedquant {

void bind_decoder(pybind11::module_ &m);
void bind_snapshot(pybind11::module_ &m);

}  // namespace mixedquant

#endif
