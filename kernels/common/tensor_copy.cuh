// Boxes of tensors that the copy engine moves between global and shared memory (TMA), from compute capability 9.0 on: no lane waits
// for its row, and rows do not pass through the first-level cache one by one. What is compiled for older devices does not run.
#pragma once
#include "address.cuh"
#include "params.cuh"

namespace common {

#if __CUDA_ARCH__ >= 900
constexpr bool COPIES_BOXES = true;
#else
constexpr bool COPIES_BOXES = false;
#endif

// What a warp waits for: a barrier in shared memory (mbarrier), at which the bytes of boxes arrive that a lane has asked for, or others
// that are done with something.
struct Arrival {
    uint64_t barrier;
    // Of the arrivals that have been waited for, whether their number is odd.
    uint64_t parity;

    // By one lane; the block meets before boxes are asked for. `count`: how many arrive each time.
    __device__ __forceinline__ void init(int count = 1) {
#if __CUDA_ARCH__ >= 900
        parity = 0;
        asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(count) : "memory");
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
    }
    // By the lane that then asks for so many bytes.
    __device__ __forceinline__ void expect(int bytes) {
#if __CUDA_ARCH__ >= 900
        asm volatile("{.reg .b64 state; mbarrier.arrive.expect_tx.shared::cta.b64 state, [%0], %1;}" ::"r"(shared_address(&barrier)),
                     "r"(bytes)
                     : "memory");
#endif
    }
    // Arrives with nothing, by one lane, for so many of those that arrive each time.
    __device__ __forceinline__ void arrive(int count) {
#if __CUDA_ARCH__ >= 900
        asm volatile("{.reg .b64 state; mbarrier.arrive.shared::cta.b64 state, [%0], %1;}" ::"r"(shared_address(&barrier)), "r"(count)
                     : "memory");
#endif
    }
    // By all lanes: waits for what has been expected.
    __device__ __forceinline__ void wait() {
        const uint32_t turn = static_cast<uint32_t>(parity);
        wait(turn);
        __syncwarp();
        if (threadIdx.x % 32 == 0) parity = turn ^ 1;
    }
    // The same for those who know themselves whether the number of arrivals that have been waited for is odd.
    __device__ __forceinline__ void wait(uint32_t turn) const {
#if __CUDA_ARCH__ >= 900
        uint32_t is_there = 0;
        while (!is_there) {
            asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                         : "=r"(is_there)
                         : "r"(shared_address(&barrier)), "r"(turn)
                         : "memory");
        }
#endif
    }
};

// What this thread has read and written in shared memory comes before boxes that are asked for after it.
__device__ __forceinline__ void fence_boxes() {
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Before a map that lies in global memory is used in a block for the first time: the copy engine may have kept what was there before.
__device__ __forceinline__ void acquire_map(const TensorMap &map) {
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.proxy.tensormap::generic.acquire.sys [%0], 128;" ::"l"(&map) : "memory");
#endif
}

// Asks for the box of a tensor of three dimensions that begins at (x, y, z), the innermost first; what lies outside is zero.
__device__ __forceinline__ void load_box(void *to, const TensorMap &from, Arrival &arrival, int x, int y, int z) {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(
                     shared_address(to)),
                 "l"(&from), "r"(shared_address(&arrival.barrier)), "r"(x), "r"(y), "r"(z)
                 : "memory");
#endif
}

// The same of what is read once: it makes room for other things in the second-level cache first. (The policy is that of `createpolicy`
// for all of it.)
__device__ __forceinline__ void load_box_once(void *to, const TensorMap &from, Arrival &arrival, int x, int y, int z) {
#if __CUDA_ARCH__ >= 900
    constexpr uint64_t EVICT_FIRST = 0x12f0000000000000;
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%3, %4, %5}], "
                 "[%2], %6;" ::"r"(shared_address(to)),
                 "l"(&from), "r"(shared_address(&arrival.barrier)), "r"(x), "r"(y), "r"(z), "l"(EVICT_FIRST)
                 : "memory");
#endif
}

// Starts writing a box from shared memory, where it may be changed after `wait_for_boxes` of the same thread.
__device__ __forceinline__ void store_box(const TensorMap &to, const void *from, int x, int y, int z) {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(&to),
                 "r"(shared_address(from)), "r"(x), "r"(y), "r"(z)
                 : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_boxes() {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
#endif
}

}
