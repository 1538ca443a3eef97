// x_proj and the state update of what it gives, in one launch.
//
// The blocks of a cluster divide the columns of x_proj, 16 at a time, and leave what they get in the shared memory of all; then each
// updates channels of its own. So every cluster multiplies its rows with the whole matrix, which is small and lies in the second-level
// cache, and no kernel has to end in between. Sums have the order that they have in linear.cu and update.cu, by the same code.
#include "../common/cluster.cuh"
#include "../common/launch.cuh"
#include "products.cuh"
#include "update.cuh"

namespace decode::projected {

static_assert(is_bijection_in_rows<THREADS>());
static_assert(THREADS == linear::THREADS && ROWS == linear::TILE_ROWS);

// Puts the columns of the block's tiles, `(ROWS, distance)`, into every block of the cluster.
template <typename T>
__device__ __forceinline__ void project(const Linear &p, float *columns, int distance, float *partials, linear::Products<T, 1, true> &products,
                                        typename linear::Products<T, 1, true>::Part &part, const linear::Share &share) {
    using namespace linear;
    constexpr int PARTIALS = TILE_ROWS * PARTIAL_STRIDE;
    const BlockRows<T, TILE_ROWS, true> rows(p);
    const int rank = cluster_rank(), out_features = static_cast<int>(p.out_features), features = static_cast<int>(p.features);
#pragma unroll 1
    for (int first = rank * OUTPUTS; first < out_features; first += CLUSTER * OUTPUTS) {
        if (first > rank * OUTPUTS) {
            products.ask(part, p, first, 0, features, share);
            // All have read the sums of the tile before.
            __syncthreads();
        }
        products.clear();
        products.template add_directly<false>(part, rows, Squares<TILE_ROWS>{nullptr}, p, features, share);
        products.leave(partials + threadIdx.x / 32 * PARTIALS);
        __syncthreads();
        // Each element as often as there are blocks, by as many threads.
        for (int i = threadIdx.x; i < OUTPUTS * CLUSTER * rows.count; i += THREADS) {
            const int output = i % OUTPUTS, to = i / OUTPUTS % CLUSTER, row = i / (OUTPUTS * CLUSTER);
            if (first + output >= out_features) continue;
            const float sum = rounded<T>(sum_of_warps(partials + row * PARTIAL_STRIDE + output, TILE_ROWS));
            store_in_block(columns + row * distance + first + output, to, sum);
            if (to == 0 && blockIdx.x < CLUSTER) {
                static_cast<T *>(p.out)[(rows.first + row) * p.out_features + first + output] = narrow<T>(sum);
            }
        }
    }
}

template <typename T, typename St> __device__ __forceinline__ void run(const ProjectedCall &params) {
    extern __shared__ __align__(16) unsigned char memory[];
    begin_next();
    using Products = linear::Products<T, 1, true>;
    const Linear &of = params.project;
    const Update &p = params.update;
    const Slots &slots = params.slots;
    // After the warps' sums: whole vectors of a row's columns are read.
    float *partials = reinterpret_cast<float *>(memory), *columns = partials + linear::WARPS * ROWS * linear::PARTIAL_STRIDE;
    const int distance = static_cast<int>(of.out_features + QUAD - 1) / QUAD * QUAD;
    const int lane_shift = static_cast<int>(p.part_shift);
    const RowMap map(threadIdx.x, lane_shift);
    const int channels = static_cast<int>(p.d_inner), index = blockIdx.x * (THREADS >> lane_shift) + map.row;
    const bool exists = index < channels;
    // The matrix, what is the channels' and the first row's states are read before other kernels have ended.
    const int features = static_cast<int>(of.features);
    const linear::Share share(features, linear::CHUNK, threadIdx.x / 32, false);
    Products products(memory);
    typename Products::Part part;
    products.ask(part, of, cluster_rank() * linear::OUTPUTS, 0, features, share);
    products.prefetch_rest(part);
    const int first = blockIdx.y * ROWS, last = min(first + ROWS, static_cast<int>(p.rows));
    // Of the models whose x_proj is this small the projections are held whole.
    using RowUpdate = update::RowUpdate<T, St, true, 4>;
    const typename RowUpdate::ChannelOf channel(p, min(index, channels - 1), map);
    RowUpdate now(p, slot_of(slots, first), channel, exists);
    for (int row = first + 1; row < last && exists; row++) update::prefetch_states<St>(p, slots, row, index, channel.place(0));
    // Nobody writes to a block that has not begun.
    cluster_arrive();
    cluster_wait();
    wait_for_last();
    now.read_inputs(p, channel, first);
    project<T>(of, columns, distance, partials, products, part, share);
    cluster_arrive();
    cluster_wait();
    if (p.flags & update::FLAG_NORMS) {
        for (int row = 0; row < last - first; row++) {
            float *at = columns + row * distance;
            update::norm_parts<T>(at, update::StagedColumns{at}, p, threadIdx.x, THREADS);
        }
        __syncthreads();
    }
#pragma unroll 1
    for (int row = first; row < last; row++) {
        RowUpdate next = now;
        if (row + 1 < last) {
            next = RowUpdate(p, slot_of(slots, row + 1), channel, exists);
            next.read_inputs(p, channel, row + 1);
        }
        const float output = now.run(p, channel, columns + (row - first) * distance);
        if (map.lane == 0 && exists) update::write_output<T>(p, row, index, output);
        now = next;
    }
}

#define INSTANCE(NAME, T, St)                                                                                          \
    extern "C" __global__ void CLUSTER_OF(CLUSTER) __launch_bounds__(THREADS, 2)                                       \
        decode_projected_##NAME(const __grid_constant__ ProjectedCall params) {                                            \
        run<T, St>(params);                                                                                            \
    }

#define POOLS(NAME, T)                                                                                                 \
    INSTANCE(NAME##_f32, T, float)                                                                                     \
    INSTANCE(NAME##_f16, T, __half)                                                                                    \
    INSTANCE(NAME##_bf16, T, __nv_bfloat16)

POOLS(f16, __half)
POOLS(bf16, __nv_bfloat16)

}
