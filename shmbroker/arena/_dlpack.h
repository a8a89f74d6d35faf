/* DLPack's structures, as its specification has them: https://dmlc.github.io/dlpack/latest/c_api.html
 *
 * DLManagedTensor is that of DLPack 0.x, which every torch can read. The exchange of tensors by C functions came with DLPack 1.2: a type that has it
 * offers a capsule as its attribute __dlpack_c_exchange_api__.
 */
#ifndef SHMBROKER_DLPACK_H
#define SHMBROKER_DLPACK_H

#include <stdint.h>

typedef struct {
    int32_t device_type;
    int32_t device_id;
} DLDevice;

typedef struct {
    uint8_t code;
    uint8_t bits;
    uint16_t lanes;
} DLDataType;

typedef struct {
    void *data;
    DLDevice device;
    int32_t ndim;
    DLDataType dtype;
    int64_t *shape;
    int64_t *strides;
    uint64_t byte_offset;
} DLTensor;

typedef struct DLManagedTensor {
    DLTensor dl_tensor;
    void *manager_ctx;
    void (*deleter)(struct DLManagedTensor *self);
} DLManagedTensor;

typedef struct {
    uint32_t major;
    uint32_t minor;
} DLPackVersion;

typedef struct DLManagedTensorVersioned {
    DLPackVersion version;
    void *manager_ctx;
    void (*deleter)(struct DLManagedTensorVersioned *self);
    uint64_t flags;
    DLTensor dl_tensor;
} DLManagedTensorVersioned;

typedef struct DLPackExchange {
    DLPackVersion version;
    struct DLPackExchange *previous;
    void *allocate;
    void *from_object;
    int (*to_object)(DLManagedTensorVersioned *tensor, void **object); /* takes over the tensor; 0, or -1 with an error set */
    int (*borrow)(void *object, DLTensor *tensor);                     /* lasts until control is given back; 0, or -1 with an error set */
    void *stream;
} DLPackExchange;

enum { DL_CPU = 1, DL_UNSIGNED = 1, DL_COMPLEX = 5 };

#define DLPACK_EXCHANGE "dlpack_exchange_api"

#endif
