// Reading rows of logits, and what the threads of a block find out together.
#pragma once
#include "weights.cuh"

namespace sampling {

constexpr int WARP = 32;
static_assert(TILE == THREADS, "a thread for each token of a tile");

// The highest of penalised logits and the first token that has it, as a number that is greatest for these.
struct Best {
    uint64_t value;

    __device__ __forceinline__ static uint64_t of(float y, int token) {
        return uint64_t(key_of(y)) << 32 | ~static_cast<uint32_t>(token);
    }
    __device__ __forceinline__ float logit() const { return logit_of(static_cast<uint32_t>(value >> 32)); }
    __device__ __forceinline__ int token() const { return static_cast<int>(~static_cast<uint32_t>(value)); }
};

// The settings of a slot, if it is one: they are read before other kernels have ended.
__device__ __forceinline__ Settings settings_of(const Sample &p, int64_t slot) {
    Settings settings = {};
    if (slot >= 0) settings = p.settings[slot];
    return settings;
}

// A row's logits, and what they are penalised by.
struct Row {
    const float *logits;
    // The bits of the sequence; null if nothing is penalised.
    const uint32_t *occurred;
    float penalty;
    int tokens;
    bool is_whole;

    __device__ __forceinline__ Row(const Sample &p, int64_t row, int64_t slot, float repetition_penalty) {
        logits = p.logits + row * p.stride;
        occurred = p.occurred && repetition_penalty != 1.0f ? p.occurred + slot * p.words : nullptr;
        penalty = repetition_penalty;
        tokens = static_cast<int>(p.tokens);
        is_whole = p.is_whole;
    }

    // The logits from `first` on, a multiple of QUAD; -infinity beyond the last.
    __device__ __forceinline__ void load(int first, float (&x)[QUAD]) const {
        if (is_whole && first + QUAD <= tokens) {
            const float4 four = *reinterpret_cast<const float4 *>(logits + first);
            x[0] = four.x, x[1] = four.y, x[2] = four.z, x[3] = four.w;
        } else {
#pragma unroll
            for (int i = 0; i < QUAD; i++) x[i] = first + i < tokens ? logits[first + i] : -INFINITY;
        }
    }

    // The same after the penalty.
    __device__ __forceinline__ void penalise(int first, float (&x)[QUAD]) const {
        if (!occurred || first >= tokens) return;
        const uint32_t bits = occurred[first / 32] >> (first % 32);
#pragma unroll
        for (int i = 0; i < QUAD; i++) {
            if (bits >> i & 1) x[i] = penalised(x[i], penalty);
        }
    }

    // A single logit after the penalty; -infinity beyond the last.
    __device__ __forceinline__ float at(int token) const {
        if (token >= tokens) return -INFINITY;
        const float x = logits[token];
        return occurred && occurred[token / 32] >> (token % 32) & 1 ? penalised(x, penalty) : x;
    }
};

// Which lane of a warp has which tokens of its tile:
//
//     token        0 … 3 | 4 … 7 | … | 124 … 127 | 128 … 131 | … | 508 … 511
//     lane, quad    0, 0 |  1, 0 | … |     31, 0 |      0, 1 | … |     31, 3
__device__ __forceinline__ int first_token(int tile, int quad) {
    return tile * TILE + (quad * WARP + static_cast<int>(threadIdx.x % WARP)) * QUAD;
}

// Calls `each` for the quads of a tile that a lane has, with the first token of each and the logits. All are loaded
// first; the calls are a loop that is not unrolled, so that there is little code.
template <typename Each> __device__ __forceinline__ void for_each_quad(const Row &row, int tile, Each each) {
    float x[QUADS][QUAD];
#pragma unroll
    for (int quad = 0; quad < QUADS; quad++) row.load(first_token(tile, quad), x[quad]);
#pragma unroll 1
    for (int quad = 0; quad < QUADS; quad++) {
        const int first = first_token(tile, quad);
        if (first >= row.tokens) break;
        float own[QUAD];
#pragma unroll
        for (int i = 0; i < QUAD; i++) {
            own[i] = x[0][i];
            // Registers have no index: what comes next is moved up.
#pragma unroll
            for (int next = 1; next < QUADS; next++) x[next - 1][i] = x[next][i];
        }
        each(first, own);
    }
}

// Calls `each` for the tokens of a quad, in a loop that is not unrolled either.
template <typename Each> __device__ __forceinline__ void for_each_of(float (&x)[QUAD], Each each) {
#pragma unroll 1
    for (int i = 0; i < QUAD; i++) {
        const float own = x[0];
#pragma unroll
        for (int next = 1; next < QUAD; next++) x[next - 1] = x[next];
        each(own, i);
    }
}

// Calls `each` for all tokens of a tile that a lane has, with their penalised logits. Beyond the last token there is
// -infinity.
template <typename Each> __device__ __forceinline__ void for_each_token(const Row &row, int tile, Each each) {
    for_each_quad(row, tile, [&](int first, float (&y)[QUAD]) {
        row.penalise(first, y);
        for_each_of(y, [&](float y, int i) { each(y, first + i); });
    });
}

__device__ __forceinline__ uint64_t sum_of_warp(uint64_t own) {
#pragma unroll
    for (int distance = WARP / 2; distance > 0; distance /= 2) own += __shfl_xor_sync(~0u, own, distance);
    return own;
}

// The part of a row that a block has: tiles from `first` to `end`, of which its warps take turns.
struct Chunk {
    int64_t row;
    int index, first, end;

    __device__ __forceinline__ explicit Chunk(const Sample &p) {
        const uint32_t chunks = static_cast<uint32_t>(p.chunks);
        row = blockIdx.x / chunks;
        index = static_cast<int>(blockIdx.x % chunks);
        first = index * static_cast<int>(p.chunk_tiles);
        end = min(first + static_cast<int>(p.chunk_tiles), static_cast<int>(p.tiles));
    }
    __device__ __forceinline__ int first_of_warp() const { return first + threadIdx.x / WARP; }
};

// The combination of what all threads of a block have, in each of them. `scratch` may be used again afterwards.
template <typename T, typename Join> __device__ __forceinline__ T of_block(T own, T (&scratch)[WARPS], Join join) {
#pragma unroll
    for (int distance = WARP / 2; distance > 0; distance /= 2) own = join(own, __shfl_xor_sync(~0u, own, distance));
    if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = own;
    __syncthreads();
    own = scratch[0];
#pragma unroll 4
    for (int i = 1; i < WARPS; i++) own = join(own, scratch[i]);
    __syncthreads();
    return own;
}

__device__ __forceinline__ uint64_t sum_of_block(uint64_t own, uint64_t (&scratch)[WARPS]) {
    return of_block(own, scratch, [](uint64_t a, uint64_t b) { return a + b; });
}

__device__ __forceinline__ uint64_t greatest_of_block(uint64_t own, uint64_t (&scratch)[WARPS]) {
    return of_block(own, scratch, [](uint64_t a, uint64_t b) { return a > b ? a : b; });
}

// The sum of what the threads before this one have. `scratch` may be used again afterwards.
__device__ __forceinline__ uint64_t sum_before(uint64_t own, uint64_t (&scratch)[WARPS]) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    uint64_t sum = own;
#pragma unroll
    for (int distance = 1; distance < WARP; distance *= 2) {
        const uint64_t before = __shfl_up_sync(~0u, sum, distance);
        if (lane >= distance) sum += before;
    }
    if (lane == WARP - 1) scratch[warp] = sum;
    __syncthreads();
#pragma unroll 4
    for (int i = 0; i < WARPS; i++) {
        if (i < warp) sum += scratch[i];
    }
    __syncthreads();
    return sum - own;
}

}
