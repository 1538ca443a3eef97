// The backward scan in blocks of two warps, three of which a processor has at a time in place of two of four warps: for so many
// blocks that one processor would have two of those and another one.
#define SCAN_BACKWARD_NARROW
#include "backward.cu"
