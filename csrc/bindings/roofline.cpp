// ptq4adm._cpu: ceilings of the machine and the instruction sampler, for benchmarks.

#include "../cpu/roofline.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "../cpu/sampler.h"

namespace py = pybind11;
using namespace py::literals;

namespace {

py::dict sampler_stop() {
  const ptq4adm::InstructionCounts counts = ptq4adm::sampler_stop();
  return py::dict("total"_a = counts.total, "sse"_a = counts.sse, "bits128"_a = counts.bits128,
                  "bits256"_a = counts.bits256, "bits512"_a = counts.bits512,
                  "evex"_a = counts.evex, "dpbusd"_a = counts.dpbusd);
}

}  // namespace

void bind_roofline(py::module_& module) {
  module.def("peak_kinds", &ptq4adm::peak_kinds, "Names that measure_peak knows.");
  module.def("peak_missing", &ptq4adm::peak_missing,
             "Why a peak cannot be measured on this processor, or an empty string.", "kind"_a);
  module.def("measure_peak", &ptq4adm::measure_peak,
             "Rate of an instruction chain or of copying, in 10^9 a second.", "kind"_a,
             "milliseconds"_a, "threads"_a, py::call_guard<py::gil_scoped_release>());
  module.def(
      "sampler_missing",
      [] {
        const char* reason = ptq4adm::sampler_missing();
        return std::string(reason == nullptr ? "" : reason);
      },
      "Why instructions cannot be sampled here, or an empty string.");
  module.def("sampler_start", &ptq4adm::sampler_start, "Start counting executed instructions.");
  module.def("sampler_stop", &sampler_stop, "Stop, and return samples by kind of instruction.");
}
