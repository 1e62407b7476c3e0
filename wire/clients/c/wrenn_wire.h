/* A client for the Wrenn wire protocol, version 1 (wire/PROTOCOL.md): libc only, one thread a client.
 *
 * Numbers of messages and their fields are in PROTOCOL.md. Build a body with wrenn_put_*, in the order of
 * the message's fields; wrenn_open and wrenn_send add the empty extension list. Read one with wrenn_get_*.
 * Functions that return int return 0 on success and -1 on failure, with the reason in wrenn_error(). */
#ifndef WRENN_WIRE_H
#define WRENN_WIRE_H

#include <stddef.h>
#include <stdint.h>

enum { WRENN_STDIN = 0, WRENN_STDOUT = 1, WRENN_STDERR = 2, WRENN_TERMINAL = 3, WRENN_FILE = 4 };
enum { WRENN_ERROR = 0x0001, WRENN_DONE = 0x0002, WRENN_FORWARD = 0x0110 };

/* Bytes that grow. `failed` is set when memory ran out, and then everything is refused. */
struct wrenn_buffer {
    uint8_t *data;
    size_t length, capacity;
    int failed;
};
void wrenn_put(struct wrenn_buffer *b, const void *data, size_t length);
void wrenn_put_number(struct wrenn_buffer *b, uint64_t value, int bytes);
void wrenn_put_bytes(struct wrenn_buffer *b, const void *data, size_t length);
void wrenn_put_text(struct wrenn_buffer *b, const char *text);
void wrenn_free(struct wrenn_buffer *b);

/* A cursor over a body. `failed` is set when the body ended inside a field. */
struct wrenn_reader {
    const uint8_t *data;
    size_t left;
    int failed;
};
uint64_t wrenn_get_number(struct wrenn_reader *r, int bytes);
const uint8_t *wrenn_get_bytes(struct wrenn_reader *r, size_t *length);

/* Checks a body by its number and, where `json` is not NULL, appends its fields to it, one after another
 * as "name":value and a comma. NULL, or the error's name in the vectors. */
const char *wrenn_check_message(uint16_t kind, const uint8_t *body, size_t length, struct wrenn_buffer *json);

/* Checks a frame header. NULL, or the error's name in the vectors. */
struct wrenn_header {
    uint32_t length, stream;
    uint8_t type, fin;
};
const char *wrenn_check_header(const uint8_t bytes[12], struct wrenn_header *header);

/* The protocol without the socket: what is to be sent gathers in `output`. NULL, or the error's name. */
struct wrenn_client;
struct wrenn_client *wrenn_new(const char *identity, const void *secret, size_t secret_length,
                               const char *program, const uint8_t nonce[18]);
const char *wrenn_receive(struct wrenn_client *c, const uint8_t *data, size_t length);
struct wrenn_buffer *wrenn_output(struct wrenn_client *c);

/* Connects and authenticates. NULL on failure, with the reason in `error`. */
struct wrenn_client *wrenn_connect(const char *host, const char *port, const char *identity,
                                   const void *secret, size_t secret_length, int timeout_ms, char *error,
                                   size_t error_size);
void wrenn_close(struct wrenn_client *c);
const char *wrenn_error(const struct wrenn_client *c);

/* Opens a stream with its first message: its number, or 0 on failure. `fin` ends this side's half. */
uint32_t wrenn_open(struct wrenn_client *c, uint16_t kind, const struct wrenn_buffer *body, int fin);
/* Opens a stream to a capsule's guest daemon with the first message for it. */
uint32_t wrenn_open_in(struct wrenn_client *c, const char *capsule_id, uint16_t kind,
                       const struct wrenn_buffer *body, int fin);
int wrenn_send(struct wrenn_client *c, uint32_t stream, uint16_t kind, const struct wrenn_buffer *body, int fin);
/* Sends all bytes on a channel, waiting for credit as it must. */
int wrenn_send_data(struct wrenn_client *c, uint32_t stream, uint8_t channel, const void *data, size_t length);
int wrenn_finish(struct wrenn_client *c, uint32_t stream);
/* Ends the stream at once, and what it does at the far end. */
int wrenn_cancel(struct wrenn_client *c, uint32_t stream, const char *reason);

enum wrenn_event_type { WRENN_EVENT_MESSAGE, WRENN_EVENT_DATA, WRENN_EVENT_FINISHED, WRENN_EVENT_RESET };
struct wrenn_event {
    enum wrenn_event_type type;
    uint16_t kind;   /* of a message; the code of a reset */
    uint8_t channel; /* of data */
    const uint8_t *data; /* body, bytes or reason: valid until the next call */
    size_t length;
};
/* The stream's next event, waiting for it. After FINISHED and RESET there are no more. */
int wrenn_next(struct wrenn_client *c, uint32_t stream, struct wrenn_event *event);

#endif
