// The matmul launchers by GGUF type: linear.cu is compiled once for each of these forms (see forms.cuh).
#pragma once
#include "args.h"

// X(form, its number in GGUF). A library for tests is given fewer.
#ifndef OLLAMAPY_FORMS
#define OLLAMAPY_FORMS(X) \
  X(Q4_0, 2) X(Q4_1, 3) X(Q5_0, 6) X(Q5_1, 7) X(Q8_0, 8) X(Q2_K, 10) X(Q3_K, 11) X(Q4_K, 12) X(Q5_K, 13) X(Q6_K, 14) \
  X(IQ4_NL, 20) X(IQ4_XS, 23) X(MXFP4, 39)
#endif

#define OLLAMAPY_DECLARE(form, number) extern "C" int ollamapy_linear_##form(const ollamapy::cuda::LinearArgs*, int path, void* stream);
OLLAMAPY_FORMS(OLLAMAPY_DECLARE)
#undef OLLAMAPY_DECLARE
extern "C" int ollamapy_norm(const ollamapy::cuda::NormArgs*, void* stream);
extern "C" int ollamapy_gated(const ollamapy::cuda::GatedArgs*, void* stream);
extern "C" int ollamapy_rope(const ollamapy::cuda::RopeArgs*, void* stream);
