#pragma once

// The kernels of one instruction set, and the choice of an instruction set at run time.

#include <string>
#include <vector>

#include "cpu/base/pool.h"
#include "cpu/base/problem.h"

namespace fastalign {

struct Kernels {
    const char* name;          // of the instruction set, as in FASTALIGN_CPU_ISA
    int vector_bytes;
    std::int64_t panel_f32, panel_f64, tile;  // layout of the cache in problem.h
    void (*forward)(const ForwardProblem&, const Pool&);
    void (*backward)(const BackwardProblem&, const Pool&);
    void (*selective_forward)(const SelectiveProblem&, const Pool&);
    void (*selective_backward)(const SelectiveProblem&, const Pool&);
    void (*divergence)(const DivergenceProblem&, const Pool&);
    void (*accumulate_fisher)(const FisherProblem&, const Pool&);
    double (*ewc_penalty)(const EwcProblem&, const Pool&);  // returns sum F (theta - theta0)^2 and writes the gradients
    void (*rms_norm)(const RmsNormProblem&, const Pool&);
    void (*gated)(const GatedProblem&, const Pool&);
    void (*attention)(const AttentionProblem&, const Pool&);
    void (*exp_f32)(const float* in, float* out, std::int64_t n);  // for the test of its error
};

// The kernels that this machine can run, the best ones first. Never empty.
std::vector<const Kernels*> available_kernels();
// The kernels that were built, the best ones first.
std::vector<const Kernels*> compiled_kernels();

}  // namespace fastalign
