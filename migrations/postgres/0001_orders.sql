-- One row for each order. Paging is by the id alone: ids are UUIDv7 and grow with time.
-- Product and quantity beside the key are what a retried order is compared with.
-- Types are spelled out by size: INT alone is eight bytes on CockroachDB.
CREATE TABLE orders (
    id UUID PRIMARY KEY,
    product_id TEXT NOT NULL,
    quantity INT4 NOT NULL,
    idempotency_key TEXT UNIQUE,
    placed_at INT8 NOT NULL -- milliseconds since 1970, as on SQLite
);
