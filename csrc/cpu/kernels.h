#pragma once

// The kernels of one instruction set, and the choice among them at run time.

#include <string>
#include <vector>

#include "cpu/base/pool.h"
#include "cpu/base/problem.h"

namespace fastalign {

struct Kernels {
    const char* name;          // of the instruction set, as in FASTALIGN_CPU_ISA
    int vector_bytes;
    std::int64_t panel_f32, panel_f64, tile;  // the cache's layout, see problem.h
    void (*forward)(const ForwardProblem&, const Pool&);
    void (*backward)(const BackwardProblem&, const Pool&);
    void (*selective_forward)(const SelectiveProblem&, const Pool&);
    void (*selective_backward)(const SelectiveProblem&, const Pool&);
    void (*divergence)(const DivergenceProblem&, const Pool&);
    void (*accumulate_fisher)(const FisherProblem&, const Pool&);
    double (*ewc_penalty)(const EwcProblem&, const Pool&);  // sum F (theta - theta0)^2, and the gradients
    void (*rms_norm)(const RmsNormProblem&, const Pool&);
    void (*gated)(const GatedProblem&, const Pool&);
    void (*attention)(const AttentionProblem&, const Pool&);
    void (*exp_f32)(const float* in, float* out, std::int64_t n);  // for the test of its error
};

// Those that this machine can run, best first. Never empty.
std::vector<const Kernels*> available_kernels();
// Those that were built, best first.
std::vector<const Kernels*> compiled_kernels();

}  // namespace fastalign
