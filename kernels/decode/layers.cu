// A few rows through whole layers of Mamba, all of them in one launch.
//
// What a token of a large model takes is the time in which its matrices can be read. Products that are launched one by one leave
// memory idle between two of them, and so does a small update between large products. Here a block knows which parts of all matrices
// it multiplies, from the first layer to the last. One of its lanes has the copy engine bring them in that order, as far ahead as shared
// memory has room, whatever the others, the workers, wait for.
//
//   in_proj (norm, convolution) | x_proj | update | out_proj (addition)
//
// Between two of these, blocks need what others have computed. There is no barrier of the grid: each number is published together
// with the number of the launch, 64 bits at once, and whoever needs it polls until it is there. (NCCL calls that
// its protocol of low latency.) Each layer has words of its own, so that none is overwritten before all have read it.
//
// Sums have the order that they have in linear.cu and update.cu.
#include "../common/mma.cuh"
#include "../common/tensor_copy.cuh"
#include "finish.cuh"
#include "rows.cuh"
#include "update.cuh"

namespace decode::layers {

using linear::CHUNK, linear::OUTPUTS, linear::PARTIAL_STRIDE, linear::MAX_WIDTH;
using linear::ConvPlace, linear::SCALES_FIRST, linear::Share, linear::Squares, linear::Taps;
using linear::finished, linear::sum_of_warps;

// Publishes 32 bits to the other blocks of a launch.
__device__ __forceinline__ void publish(uint64_t *to, uint32_t bits, uint32_t launch) {
    asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(to), "l"(static_cast<uint64_t>(launch) << 32 | bits) : "memory");
}

__device__ __forceinline__ bool is_of(uint64_t word, uint32_t launch) { return static_cast<uint32_t>(word >> 32) == launch; }

__device__ __forceinline__ uint64_t load_word(const uint64_t *from) {
    uint64_t word;
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(word) : "l"(from) : "memory");
    return word;
}

// Waits for 32 bits each.
__device__ __forceinline__ void receive(uint32_t (&to)[2], const uint64_t *first, const uint64_t *second, uint32_t launch) {
    uint64_t words[2];
    do {
        words[0] = load_word(first), words[1] = load_word(second);
    } while (!is_of(words[0], launch) || !is_of(words[1], launch));
    to[0] = static_cast<uint32_t>(words[0]), to[1] = static_cast<uint32_t>(words[1]);
}

// Waits for `pairs` pairs of words, by a warp, and calls `visit` with each pair's number and its bits.
template <typename Visit> __device__ __forceinline__ void receive_all(const uint64_t *from, int pairs, uint32_t launch, const Visit &visit) {
    // Loads that are on their way together; a lane that has no pair left takes the last one.
    constexpr int TOGETHER = 4;
    if (pairs <= 0) return;
    // Until one word is there there is no point in looking for all of them, which keeps memory from those who leave them.
    while (!is_of(load_word(from), launch)) {
    }
#pragma unroll 1
    for (int first = 0; first < pairs; first += 32 * TOGETHER) {
        const uint64_t *at[TOGETHER];
#pragma unroll
        for (int i = 0; i < TOGETHER; i++) at[i] = from + 2 * min(first + 32 * i + static_cast<int>(threadIdx.x % 32), pairs - 1);
        uint64_t words[TOGETHER][2];
        bool are_there;
        do {
            are_there = true;
#pragma unroll
            for (int i = 0; i < TOGETHER; i++) {
                asm volatile("ld.relaxed.gpu.global.v2.u64 {%0, %1}, [%2];" : "=l"(words[i][0]), "=l"(words[i][1]) : "l"(at[i]) : "memory");
            }
#pragma unroll
            for (int i = 0; i < TOGETHER; i++) are_there &= is_of(words[i][0], launch) & is_of(words[i][1], launch);
        } while (!__all_sync(0xffffffffu, are_there));
#pragma unroll
        for (int i = 0; i < TOGETHER; i++) {
            const int pair = first + 32 * i + threadIdx.x % 32;
            if (pair < pairs) visit(pair, static_cast<uint32_t>(words[i][0]), static_cast<uint32_t>(words[i][1]));
        }
    }
}

// What is read at the beginning of a launch and written at its end: by blocks that would not have got so far had not all others read it.
__device__ __forceinline__ uint32_t read_before(const void *from) {
    uint32_t bits;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(bits) : "l"(from) : "memory");
    return bits;
}
__device__ __forceinline__ void write_after(void *to, uint32_t bits) {
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(bits) : "memory");
}

__device__ __forceinline__ const Linear &product(const Layer &layer, int matrix) {
    return matrix == IN_PROJ ? layer.in_proj : matrix == X_PROJ ? layer.project : layer.out_proj;
}

// The order of a block's tiles of all matrices. It takes every `gridDim.x`th one, as if all were one list, so that every block has as
// much to read.
struct Schedule {
    int layer, matrix, tile;

    __device__ __forceinline__ explicit Schedule(const LayersCall &p) : layer(0), matrix(0), tile(blockIdx.x) { settle(p); }
    __device__ __forceinline__ bool is_over(const LayersCall &p) const { return layer >= static_cast<int>(p.count); }
    __device__ __forceinline__ bool is_in(int of_layer, int of_matrix) const { return layer == of_layer && matrix == of_matrix; }
    __device__ __forceinline__ void next(const LayersCall &p) {
        tile += gridDim.x;
        settle(p);
    }

  private:
    __device__ __forceinline__ void settle(const LayersCall &p) {
        while (!is_over(p) && tile >= static_cast<int>(p.tiles[matrix])) {
            tile -= static_cast<int>(p.tiles[matrix]);
            if (++matrix == MATRICES) matrix = 0, layer++;
        }
    }
};

__device__ __forceinline__ Share share_of(const LayersCall &p, int matrix, int warp) {
    return Share(static_cast<int>(p.chunks[matrix]) * CHUNK, CHUNK, warp, false);
}

// The matrices come in chunks, 32 features of the 16 columns of a tile, and batches of these, the last of which in a tile may reach
// beyond it. There are places for so many batches, which are full or on their way.
struct Ring {
    const LayersCall &p;
    unsigned char *const batches;
    Arrival *const arrivals;

    __device__ __forceinline__ Ring(const LayersCall &p, unsigned char *memory)
        : p(p), batches(memory), arrivals(reinterpret_cast<Arrival *>(memory + p.arrivals)) {}

    __device__ __forceinline__ int count() const { return static_cast<int>(p.batches); }
    __device__ __forceinline__ unsigned char *at(int i) const { return batches + i * (BATCH * CHUNK_BYTES); }
    // At which its chunks arrive, and all warps once they have used them.
    __device__ __forceinline__ Arrival &full(int i) const { return arrivals[i]; }
    __device__ __forceinline__ Arrival &empty(int i) const { return arrivals[count() + i]; }

    __device__ __forceinline__ void init(int thread) const {
        if (thread >= count()) return;
        full(thread).init();
        empty(thread).init(WARPS);
    }

    // Brings all batches, by one lane.
    __device__ __forceinline__ void bring() const {
        const auto turn_of = [&](int i) { return static_cast<uint32_t>(i / count() & 1); };
        int asked = 0;
        const TensorMap *last = nullptr;
        for (Schedule schedule(p); !schedule.is_over(p); schedule.next(p)) {
            const TensorMap &map = p.maps[schedule.layer * MATRICES + schedule.matrix];
            if (&map != last) acquire_map(map);
            last = &map;
            for (int chunk = 0; chunk < static_cast<int>(p.chunks[schedule.matrix]); chunk += BATCH, asked++) {
                const int i = asked % count();
                if (asked >= count()) empty(i).wait(turn_of(asked) ^ 1);
                // With too much on its way, what blocks leave to each other would be late.
                if (asked >= PACE) full((asked - PACE) % count()).wait(turn_of(asked - PACE));
                full(i).expect(BATCH * CHUNK_BYTES);
                load_box_once(at(i), map, full(i), 0, schedule.tile * OUTPUTS, chunk);
            }
        }
    }
};

// Which of a tile's batches a warp has chunks in, `first` to before `last`, of how many; and how many warps have chunks in one.
struct Reach {
    int first, last, count, share, chunks;

    __device__ __forceinline__ Reach(const LayersCall &p, int matrix, const Share &of_warp)
        : first(of_warp.first / BATCH), last(of_warp.first == of_warp.last ? first : (of_warp.last - 1) / BATCH + 1),
          chunks(static_cast<int>(p.chunks[matrix])) {
        count = (chunks + BATCH - 1) / BATCH, share = (chunks + WARPS - 1) / WARPS;
    }

    // For how many warps this one says that batch `i` has been used: itself, and the first one for those that have nothing in it.
    __device__ __forceinline__ int speaks_for(int i, int warp) const {
        // Those that begin before a chunk.
        const auto before = [&](int chunk) {
            int warps = 0;
#pragma unroll
            for (int j = 0; j < WARPS; j++) warps += j * share < chunk;
            return warps;
        };
        return warp == before(i * BATCH + 1) - 1 ? WARPS - (before(min((i + 1) * BATCH, chunks)) - 1 - warp) : 1;
    }
};

// The batches for a warp, one tile's after another's.
struct Batches {
    const Ring ring;
    const int warp, lane;
    // Where the next tile's are, and whether the places have been used an odd number of times before.
    int next;
    uint32_t turn;

    __device__ __forceinline__ Batches(const Ring &ring, int warp, int lane) : ring(ring), warp(warp), lane(lane), next(0), turn(0) {}

    // Calls `visit` with each of the warp's batches of a tile: its first chunk in the tile, and the lane's part of that, which is of column
    // lane / 4, and 512 bytes on of the one 8 further on.
    //
    // Of a place only an odd number of arrivals is known from an even one. The batch before the one that is waited for there has
    // arrived: the host has seen to it that it comes so long before the last one that this warp has used that, by the pace, it must.
    template <typename Visit> __device__ __forceinline__ void for_each(const Reach &reach, const Visit &visit) {
        for (int i = reach.first; i < reach.last; i++) {
            int at = next + i;
            uint32_t parity = turn;
            while (at >= ring.count()) at -= ring.count(), parity ^= 1;
            ring.full(at).wait(parity);
            visit(i * BATCH, ring.at(at) + lane * 16);
            __syncwarp();
            if (lane == 0) ring.empty(at).arrive(reach.speaks_for(i, warp));
        }
        next += reach.count;
        while (next >= ring.count()) next -= ring.count(), turn ^= 1;
    }
};

// What an element of a product takes beside its sum, read before the sum is there.
struct Beside {
    ConvPlace place;
    float states[MAX_WIDTH - 1] = {}, weights[MAX_WIDTH] = {}, of_bias = 0.0f;

    __device__ __forceinline__ float state(int k) const { return states[k]; }
    // An array that is indexed by what the compiler does not know would lie in memory.
    __device__ __forceinline__ float weight(int k) const {
        float found = weights[0];
#pragma unroll
        for (int i = 1; i < MAX_WIDTH; i++) found = k == i ? weights[i] : found;
        return found;
    }
    __device__ __forceinline__ float bias() const { return of_bias; }

    template <typename St> __device__ __forceinline__ void read_taps(const Linear &p, int64_t slot, int out) {
        if (out >= p.d_inner) return;
        place = ConvPlace(p, slot, out);
        if (!place.exists) return;
        const Taps<St> from(p, place, out);
#pragma unroll
        for (int k = 0; k < MAX_WIDTH - 1; k++) states[k] = k + 1 < p.width ? from.state(k) : 0.0f;
#pragma unroll
        for (int k = 0; k < MAX_WIDTH; k++) weights[k] = k < p.width ? from.weight(k) : 0.0f;
        of_bias = from.bias();
    }

    template <typename St> __device__ __forceinline__ float convolve(const Linear &p, float newest) const {
        return place.exists ? linear::convolve<St>(p, place, *this, newest) : 0.0f;
    }
};

// What the workers do, each by itself.
template <typename T, typename St> struct Workers {
    using RowUpdate = update::RowUpdate<T, St, true, update::MANY_HELD<T>>;

    const LayersCall &p;
    unsigned char *const memory;
    const int warp, lane;
    const int rows;
    // The number of this launch.
    const uint32_t launch;
    Schedule schedule;
    Batches batches;
    // For the next in_proj.
    Beside taps;
    // Which half of the partial sums is written next: the other one may still be read.
    int half;

    __device__ __forceinline__ Workers(const LayersCall &p, unsigned char *memory)
        : p(p), memory(memory), warp(threadIdx.x / 32), lane(threadIdx.x % 32), rows(1 << p.row_shift),
          launch(read_before(p.launches) + 1), schedule(p),
          batches(Ring(p, memory), warp, lane), half(0) {}

    __device__ __forceinline__ static Layer &described(const LayersCall &p, unsigned char *memory, int layer) {
        return reinterpret_cast<Layer *>(memory + p.described)[layer % 2];
    }
    __device__ __forceinline__ const Layer &described(int layer) const { return described(p, memory, layer); }
    __device__ __forceinline__ float *floats(int64_t at) const { return reinterpret_cast<float *>(memory + at); }
    __device__ __forceinline__ Squares<MOST_ROWS> squares() const { return {floats(p.squares)}; }
    // The slots of the rows, which come after the squares.
    __device__ __forceinline__ static int64_t *slots(const LayersCall &p, unsigned char *memory) {
        return reinterpret_cast<int64_t *>(memory + p.squares) + MOST_ROWS * WARPS / 2;
    }
    __device__ __forceinline__ const int64_t *slots() const { return slots(p, memory); }
    // A row of the warp's share, the norm's weights of it, and the sums of all warps of a tile.
    __device__ __forceinline__ unsigned char *row_of_share(int row) const {
        return memory + p.rows + (warp * rows + row) * static_cast<int>(p.row_bytes);
    }
    __device__ __forceinline__ float *norm_weights(const Share &share) const { return floats(p.norm_weights) + share.first * CHUNK; }
    __device__ __forceinline__ float *partials(int tile) const {
        return floats(p.partials) + (half * static_cast<int>(p.most_tiles) + tile) * (WARPS * rows * PARTIAL_STRIDE);
    }
    // What blocks leave to each other.
    __device__ __forceinline__ uint64_t *words(int layer, int part) const { return p.words + layer * p.of_layer + p.part_at[part]; }
    __device__ __forceinline__ bool is_last(int layer) const { return layer + 1 == static_cast<int>(p.count); }

    // Waits for the other warps that multiply.
    __device__ __forceinline__ static void meet() { asm volatile("barrier.sync 1, %0;" ::"n"(WORKERS) : "memory"); }

    // Copies what is known of a layer to shared memory, if there is such a layer, by all workers.
    __device__ __forceinline__ static void describe(const LayersCall &p, unsigned char *memory, int layer) {
        using Piece = Pack<float, QUAD>;
        static_assert(sizeof(Layer) % sizeof(Piece) == 0);
        if (layer < static_cast<int>(p.count)) {
            const auto *const from = reinterpret_cast<const float *>(p.layers + layer);
            auto *const to = reinterpret_cast<Piece *>(&described(p, memory, layer));
            for (int i = threadIdx.x; i < static_cast<int>(sizeof(Layer) / sizeof(Piece)); i += WORKERS) copy_async(to[i], from + i * QUAD, true);
        }
        commit_copies();
    }

    // Copies the norm's weights of the warp's share, of the next layer, if there is one.
    __device__ __forceinline__ void keep_norm(int layer) const {
        if (layer < static_cast<int>(p.count)) {
            const Share share = share_of(p, IN_PROJ, warp);
            const float *const from = described(layer).in_proj.norm_weight.data + share.first * CHUNK;
            auto *const to = reinterpret_cast<Pack<float, QUAD> *>(norm_weights(share));
            for (int i = lane; i < (share.last - share.first) * (CHUNK / QUAD); i += 32) copy_async(to[i], from + i * QUAD, true);
        }
        commit_copies();
    }

    // Stages the warp's share of the rows of the stream, in f32.
    __device__ __forceinline__ void stage_stream(int layer, const Linear &of, const Share &share) const {
        const int features = static_cast<int>(of.features), pairs = (share.last - share.first) * (CHUNK / 2);
        for (int row = 0; row < rows; row++) {
            float2 *const to = reinterpret_cast<float2 *>(row_of_share(row));
            if (layer == 0) {
                // As it was before the launch.
                const float *const from = static_cast<const float *>(of.x.data) + row * of.x.row + share.first * CHUNK;
#pragma unroll 8
                for (int i = lane; i < 2 * pairs; i += 32) reinterpret_cast<uint32_t *>(to)[i] = read_before(from + i);
                continue;
            }
            const uint64_t *const from = words(layer, OF_ROWS) + row * features + share.first * CHUNK;
            receive_all(from, pairs, launch, [&](int i, uint32_t x, uint32_t y) { to[i] = {__uint_as_float(x), __uint_as_float(y)}; });
        }
        __syncwarp();
    }

    // Stages the warp's share of rows of T, as others have left them, two elements to a word.
    __device__ __forceinline__ void stage_halves(const uint64_t *from, int features, const Share &share) const {
        for (int row = 0; row < rows; row++) {
            uint2 *const to = reinterpret_cast<uint2 *>(row_of_share(row));
            receive_all(from + (row * features + share.first * CHUNK) / 2, (share.last - share.first) * (CHUNK / 4), launch,
                     [&](int i, uint32_t x, uint32_t y) { to[i] = {x, y}; });
        }
        __syncwarp();
    }

    // Norms the rows that have been staged, and leaves them there as T.
    __device__ __forceinline__ void norm(const Linear &of, const Share &share) const {
        sum_squares(share);
        if (SCALES_FIRST<T>) meet();
        const int parts = (share.last - share.first) * 4;
        for (int row = 0; row < rows; row++) {
            const float scale = SCALES_FIRST<T> ? squares().scale(of, row) : 1.0f;
            unsigned char *const at = row_of_share(row);
            // Eight features to a lane. What is written lies where others have been read before.
            for (int first = 0; first < parts; first += 32) {
                const int part = first + lane;
                const float4 *const by = reinterpret_cast<const float4 *>(norm_weights(share)) + part * 2;
                float4 x[2];
                if (part < parts) x[0] = reinterpret_cast<const float4 *>(at)[part * 2], x[1] = reinterpret_cast<const float4 *>(at)[part * 2 + 1];
                __syncwarp();
                if (part >= parts) break;
                uint32_t packed[4];
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    if (SCALES_FIRST<T>) x[j].x *= scale, x[j].y *= scale, x[j].z *= scale, x[j].w *= scale;
                    packed[2 * j] = narrow_pair(x[j].x * by[j].x, x[j].y * by[j].y, T());
                    packed[2 * j + 1] = narrow_pair(x[j].z * by[j].z, x[j].w * by[j].w, T());
                }
                reinterpret_cast<uint4 *>(at)[part] = {packed[0], packed[1], packed[2], packed[3]};
            }
        }
        __syncwarp();
    }

    // Sums up the squares of the warp's share of each row, by four lanes, in the order of linear.cu.
    __device__ __forceinline__ void sum_squares(const Share &share) const {
        const int row = lane / 4, part = lane % 4, count = share.last - share.first;
        const bool exists = row < rows;
        const float4 *const x = reinterpret_cast<const float4 *>(row_of_share(exists ? row : 0)) + part * 2;
        float sum = 0.0f;
#pragma unroll 4
        for (int i = 0; i < 2 * count; i++) {
            const float4 four = x[i / 2 * 8 + i % 2];
            sum = fmaf(four.x, four.x, sum), sum = fmaf(four.y, four.y, sum), sum = fmaf(four.z, four.z, sum), sum = fmaf(four.w, four.w, sum);
        }
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        if (part == 0 && exists) squares().leave(sum, row, true);
        __syncwarp();
    }

    // Multiplies COUNT chunks, of rows if they exist. All are read before the first is multiplied.
    template <int COUNT>
    __device__ __forceinline__ static void multiply_chunks(float (&sums)[2][4], const uint4 *x, const unsigned char *from, bool exists) {
        uint4 w[COUNT][2], eight[COUNT];
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            eight[i] = x[i * 4];
#pragma unroll
            for (int j = 0; j < 2; j++) w[i][j] = *reinterpret_cast<const uint4 *>(from + i * CHUNK_BYTES + j * (CHUNK_BYTES / 2));
        }
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            if (!exists) eight[i] = {};
            const uint32_t first[4] = {eight[i].x, 0, eight[i].y, 0}, second[4] = {eight[i].z, 0, eight[i].w, 0};
#pragma unroll
            for (int j = 0; j < 2; j++) {
                mma(sums[j], first, w[i][j].x, w[i][j].y, T());
                mma(sums[j], second, w[i][j].z, w[i][j].w, T());
            }
        }
    }

    // Multiplies the warp's share of a tile, and leaves the sums for those that finish it.
    __device__ __forceinline__ void multiply(int tile, const Share &share, const Reach &reach) {
        constexpr int MANY = 4;
        float sums[2][4] = {};
        const int row = lane / 4, part = lane % 4;
        const bool exists = row < rows;
        const uint4 *const x = reinterpret_cast<const uint4 *>(row_of_share(exists ? row : 0)) + part - share.first * 4;
        batches.for_each(reach, [&](int begin, const unsigned char *from) {
            int chunk = max(begin, share.first);
            const int end = min(begin + BATCH, share.last);
            from += (chunk - begin) * CHUNK_BYTES;
#pragma unroll 1
            for (; chunk + MANY <= end; chunk += MANY, from += MANY * CHUNK_BYTES) multiply_chunks<MANY>(sums, x + chunk * 4, from, exists);
#pragma unroll 1
            for (; chunk < end; chunk++, from += CHUNK_BYTES) multiply_chunks<1>(sums, x + chunk * 4, from, exists);
        });
        if (!exists) return;
        float *const to = partials(tile) + (warp * rows + row) * PARTIAL_STRIDE + 2 * part;
#pragma unroll
        for (int j = 0; j < 2; j++) *reinterpret_cast<float2 *>(to + 8 * j) = {sums[j][0], sums[j][1]};
    }

    // The elements that the block has of a product, and the thread's, if it has one: of as many tiles, from one on.
    struct Elements {
        int tiles, tile, row, out;
        bool exists;
    };

    // Those of a product that come next in a schedule, which is left at what follows.
    __device__ __forceinline__ Elements elements_of(Schedule &at, int layer, int matrix) const {
        const int first = at.tile, shift = static_cast<int>(p.row_shift), group = threadIdx.x / OUTPUTS;
        Elements of;
        for (of.tiles = 0; at.is_in(layer, matrix); at.next(p)) of.tiles++;
        of.tile = group >> shift, of.row = group & (rows - 1), of.exists = of.tile < of.tiles;
        of.out = (first + of.tile * static_cast<int>(gridDim.x)) * OUTPUTS + threadIdx.x % OUTPUTS;
        return of;
    }

    // Reads what the thread's element of a layer's in_proj takes beside its sum, if there is such a layer, once it has been described:
    // memory may need as long for that as for a layer.
    __device__ __forceinline__ void read_taps(int layer) {
        if (layer >= static_cast<int>(p.count)) return;
        Schedule at = schedule;
        while (!at.is_over(p) && at.layer < layer) at.next(p);
        const Elements of = elements_of(at, layer, IN_PROJ);
        taps = Beside();
        if (of.exists) taps.template read_taps<St>(described(layer).in_proj, slots()[of.row], of.out);
    }

    // A product of all rows. (One function for all matrices: the second-level cache forgets instructions when so much passes through it
    // in each layer, so that all of them should fit the processor's own.)
    __device__ __forceinline__ void multiply_all(int layer, int matrix) {
        const Linear &of = product(described(layer), matrix);
        const Elements all = elements_of(schedule, layer, matrix);
        const int64_t at = all.row * of.out_features + all.out;
        // What it is added to is looked at once the product is there, and has been left long ago: this layer's rows have been made of it.
        uint64_t before = 0;
        if (matrix == OUT_PROJ && all.exists) {
            before = layer == 0 ? read_before(static_cast<const float *>(of.out) + at) : load_word(words(layer, OF_ROWS) + at);
        }
        if (all.tiles > 0) {
            const Share share = share_of(p, matrix, warp);
            if (matrix == IN_PROJ) {
                stage_stream(layer, of, share);
                wait_for_copies<0>();
                __syncwarp();
                norm(of, share);
            } else {
                stage_halves(words(layer, matrix == X_PROJ ? OF_U : OF_Y), static_cast<int>(of.features), share);
            }
            const Reach reach(p, matrix, share);
#pragma unroll 1
            for (int i = 0; i < all.tiles; i++) multiply(i, share, reach);
        }
        // What is known of the next layer.
        if (matrix == X_PROJ) wait_for_copies<0>();
        meet();
        if (warp * 32 < all.tiles * OUTPUTS << p.row_shift) {
            float value = 0.0f;
            if (all.exists) {
                value = sum_of_warps(partials(all.tile) + all.row * PARTIAL_STRIDE + threadIdx.x % OUTPUTS, rows);
                if (matrix == IN_PROJ && !SCALES_FIRST<T>) value *= squares().scale(of, all.row);
                const float added = __uint_as_float(static_cast<uint32_t>(before));
                value = finished<T>(of, all.out, value, added, [&](float newest) { return taps.template convolve<St>(of, newest); });
            }
            const float other = __shfl_xor_sync(0xffffffffu, value, 1);
            if (all.exists) pass_on(layer, matrix, of, all, at, value, other);
        }
        half ^= 1;
    }

    // Publishes an element of a product; `other` is that of the neighbouring lane, which goes into the same word where elements are
    // halves. Those of the last layer are also written where launches one by one would have written them.
    __device__ __forceinline__ void pass_on(int layer, int matrix, const Linear &of, const Elements &all, int64_t at, float value, float other) const {
        if (matrix == OUT_PROJ) {
            if (is_last(layer)) {
                write_after(static_cast<float *>(of.out) + at, __float_as_uint(value));
                // It is made of something of every block, which therefore has read the number.
                if (at == 0) write_after(p.launches, launch);
            } else {
                publish(words(layer + 1, OF_ROWS) + at, __float_as_uint(value), launch);
            }
            return;
        }
        if (is_last(layer)) static_cast<T *>(of.out)[at] = narrow<T>(value);
        if (matrix == X_PROJ) {
            publish(words(layer, OF_COLUMNS) + at, __float_as_uint(rounded<T>(value)), launch);
        } else if (all.out % 2 == 0) {
            const int d_inner = static_cast<int>(of.d_inner);
            const bool is_u = all.out < d_inner;
            uint64_t *const to = words(layer, is_u ? OF_U : OF_Z) + (all.row * d_inner + all.out - (is_u ? 0 : d_inner)) / 2;
            publish(to, narrow_pair(value, other, T()), launch);
        }
    }

    // Carries the states on, by what x_proj gives. A warp has channels of its own.
    __device__ __forceinline__ void update_all(int layer) {
        const Update &of = described(layer).update;
        const RowMap map(lane, of.part_shift);
        const int channels = static_cast<int>(of.d_inner), of_warp = 32 / map.lanes;
        const int count = static_cast<int>(of.dt_rank + 2 * of.d_state);
        float *const columns = floats(p.columns);
        bool are_columns_there = false;
        // One warp of each block gets channels before a second one does, so that all processors ask for states.
#pragma unroll 1
        for (int first = (warp * gridDim.x + blockIdx.x) * of_warp; first < channels; first += gridDim.x * WARPS * of_warp) {
            const int index = min(first + map.row, channels - 1);
            const bool exists = first + map.row < channels;
            const typename RowUpdate::ChannelOf channel(of, index, map);
            RowUpdate now(of, slots()[0], channel, exists);
            const auto read_inputs = [&](RowUpdate &to, int row) {
                const int at = (row * channels + index) / 2;
                uint32_t both[2];
                receive(both, words(layer, OF_U) + at, words(layer, OF_Z) + at, launch);
                const auto element = [&](uint32_t of_pair) { return index % 2 ? high(of_pair, T()) : low(of_pair, T()); };
                if (to.live) to.u = element(both[0]), to.z = element(both[1]);
            };
            read_inputs(now, 0);
            if (!are_columns_there) stage_columns(layer, of, columns, count);
            are_columns_there = true;
#pragma unroll 1
            for (int row = 0; row < rows; row++) {
                RowUpdate next = now;
                if (row + 1 < rows) {
                    next = RowUpdate(of, slots()[row + 1], channel, exists);
                    read_inputs(next, row + 1);
                }
                const float output = now.run(of, channel, columns + row * count);
                const float other = __shfl_xor_sync(0xffffffffu, output, map.lanes);
                if (map.lane == 0 && exists) {
                    if (index % 2 == 0) publish(words(layer, OF_Y) + (row * channels + index) / 2, narrow_pair(output, other, T()), launch);
                    if (is_last(layer)) update::write_output<T>(of, row, index, output);
                }
                now = next;
            }
        }
        if (!are_columns_there) stage_columns(layer, of, columns, count);
    }

    // Stages the columns of all rows, each warp a part of them.
    __device__ __forceinline__ void stage_columns(int layer, const Update &of, float *columns, int count) const {
        const int pairs = rows * count / 2, each = (pairs + WARPS - 1) / WARPS, first = min(warp * each, pairs);
        float2 *const to = reinterpret_cast<float2 *>(columns) + first;
        receive_all(words(layer, OF_COLUMNS) + 2 * first, min(each, pairs - first), launch,
                 [&](int i, uint32_t x, uint32_t y) { to[i] = {__uint_as_float(x), __uint_as_float(y)}; });
        meet();
    }

    // All layers. What a layer's in_proj takes beside the rows is read while the one before does its last steps.
    __device__ __forceinline__ void run() {
#pragma unroll 1
        for (int layer = -1; layer < static_cast<int>(p.count); layer++) {
#pragma unroll 1
            for (int matrix = layer < 0 ? OUT_PROJ : IN_PROJ; matrix < MATRICES; matrix++) {
                if (matrix == OUT_PROJ) {
                    keep_norm(layer + 1);
                    read_taps(layer + 1);
                    if (layer < 0) break;
                    update_all(layer);
                }
                multiply_all(layer, matrix);
                // All have left the layer before, which lies there.
                if (matrix == IN_PROJ) describe(p, memory, layer + 1);
            }
        }
    }
};

template <typename T, typename St> __device__ __forceinline__ void run(const LayersCall &p) {
    extern __shared__ __align__(128) unsigned char memory[];
    using Workers = Workers<T, St>;
    const int warp = threadIdx.x / 32;
    const Ring ring(p, memory);
    if (threadIdx.x < WORKERS) {
        Workers::describe(p, memory, 0);
        const int row = threadIdx.x;
        if (row < 1 << p.row_shift) Workers::slots(p, memory)[row] = slot_of(p.slots, row);
        wait_for_copies<0>();
    } else {
        ring.init(threadIdx.x - WORKERS);
    }
    __syncthreads();
    if (warp == WARPS) {
        if (threadIdx.x == WORKERS) ring.bring();
    } else {
        Workers(p, memory).run();
    }
}

#define INSTANCE(NAME, T, St)                                                                                          \
    extern "C" __global__ void __launch_bounds__(THREADS, 1) decode_layers_##NAME(const __grid_constant__ LayersCall params) { \
        run<T, St>(params);                                                                                            \
    }

#define POOLS(NAME, T)                                                                                                 \
    INSTANCE(NAME##_f32, T, float)                                                                                     \
    INSTANCE(NAME##_f16, T, __half)                                                                                    \
    INSTANCE(NAME##_bf16, T, __nv_bfloat16)

POOLS(f16, __half)
POOLS(bf16, __nv_bfloat16)

}
