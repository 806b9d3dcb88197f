// One binary for every x86-64: hot functions are compiled for several instruction sets and the
// loader picks. The numbers may differ in the last bit between processors (fused multiply-add),
// as they do in a BLAS.
#pragma once

// The levels are by instruction set: "arch=haswell" is Intel's processor of that name, and an AMD
// one that has all of it would get the plainest version (measured: 5 times slower). Compilers
// before GCC 12 do not know the levels' names.
// The choice runs before a sanitizer is ready, so under one there is a single version.
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && \
    !defined(__clang__) && !defined(__SANITIZE_THREAD__) && !defined(__SANITIZE_ADDRESS__)
#if __GNUC__ >= 12
#define MOSAIC_CLONES \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define MOSAIC_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#endif
#else
#define MOSAIC_CLONES
#endif

// The body of a cloned function is a template; it has to be inlined into the clone to be
// compiled for the clone's instruction set.
#define MOSAIC_INLINE inline __attribute__((always_inline))
