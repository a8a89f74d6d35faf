/* Leases as other compiled parts use them: through the functions that shmbroker.arena._leases offers in a capsule. */
#ifndef SHMBROKER_LEASES_H
#define SHMBROKER_LEASES_H

#include "../memory/_arguments.h"

#include <shmbroker/layout.h>

#include "_dlpack.h"

/* Room.form, packed in Python: what a tensor is, less its place. */
typedef struct {
    uint8_t code;
    uint8_t bits;
    uint16_t reserved;
    int32_t ndim;
    int64_t shape[SHMBROKER_MAX_DIMS];
} Form;
_Static_assert(sizeof(Form) == 8 + 8 * SHMBROKER_MAX_DIMS, "as Room.form is packed");

struct Lease;

/* All under the interpreter lock. */
typedef struct {
    /* The block of the longest dead lease, for the caller to keep; NULL, without an error, where none has died. Runs no Python code. */
    PyObject *(*pop)(PyObject *leases);
    /* A lease of the block at `offset`, followed by one tensor_of or by one give_up. NULL with an error set. Allocates nothing that Python's collector
     * counts. */
    struct Lease *(*lend)(PyObject *leases, const Form *form, uint64_t offset, PyObject *block);
    /* The tensor over a block that was lent, made by the exchange of the tensors' type; its death gives the block back. NULL with an error set: the lease
     * is then the exchange's to end. */
    PyObject *(*tensor_of)(struct Lease *lease, const DLPackExchange *exchange);
    /* Nobody made a tensor of it: the block is given back. */
    void (*give_up)(struct Lease *lease);
} LeaseFunctions;

#define LEASE_FUNCTIONS "shmbroker.arena._leases.functions"

#endif
