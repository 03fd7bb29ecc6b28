#include "comm/thread_world.h"

static int source_rank(const ra_thread_op_t *op)
{
    return ra_op_is_offer(op) ? op->request->end->base.rank : op->transfer.peer;
}

/* Transports that match in order do not see tags. */
static uint32_t tag_of(const ra_thread_op_t *op)
{
    return op->request->end->world->row->ops->in_order ? 0 : op->transfer.tag;
}

static ra_op_queue_t *queue_of(const ra_thread_op_t *op, bool of_offers)
{
    ra_thread_end_t *self = op->request->end;
    ra_thread_end_t *to = ra_op_is_offer(op) ? self->world->ends[op->transfer.peer] : self;
    uint32_t hash = tag_of(op) * 2654435761u + (uint32_t)source_rank(op) * 40503u;
    uint32_t bucket = (hash ^ hash >> 16) % RA_MAILBOX_BUCKETS;
    return of_offers ? &to->mailbox.bucket[bucket].offers : &to->mailbox.bucket[bucket].wants;
}

static void queue_unlink(ra_op_queue_t *queue, ra_thread_op_t **place)
{
    ra_thread_op_t *op = *place;
    *place = op->next;
    if (queue->tail == &op->next) {
        queue->tail = place;
    }
    op->next = NULL;
}

void ra_mailbox_init(ra_mailbox_t *mailbox)
{
    for (int i = 0; i < RA_MAILBOX_BUCKETS; i++) {
        mailbox->bucket[i].offers.tail = &mailbox->bucket[i].offers.head;
        mailbox->bucket[i].wants.tail = &mailbox->bucket[i].wants.head;
    }
}

ra_thread_op_t *ra_mailbox_take_partner(const ra_thread_op_t *op)
{
    ra_op_queue_t *queue = queue_of(op, !ra_op_is_offer(op));
    for (ra_thread_op_t **place = &queue->head; *place != NULL; place = &(*place)->next) {
        ra_thread_op_t *other = *place;
        if (source_rank(other) == source_rank(op) && tag_of(other) == tag_of(op)) {
            queue_unlink(queue, place);
            return other;
        }
    }
    return NULL;
}

void ra_mailbox_put(ra_thread_op_t *op)
{
    ra_op_queue_t *queue = queue_of(op, ra_op_is_offer(op));
    op->state = RA_OP_QUEUED;
    op->next = NULL;
    *queue->tail = op;
    queue->tail = &op->next;
}

void ra_mailbox_withdraw(ra_thread_op_t *op)
{
    ra_op_queue_t *queue = queue_of(op, ra_op_is_offer(op));
    ra_thread_op_t **place = &queue->head;
    while (*place != op) {
        place = &(*place)->next;
    }
    queue_unlink(queue, place);
}
