// The backward scan with one channel to a lane in place of two, so that there are twice as many warps, of which a processor has 12
// at a time in place of 8. Each does more for a channel: it is for so many blocks that some processors would have two of the other
// kernel's, and others one.
#define SCAN_BACKWARD_NARROW
#include "backward.cu"
