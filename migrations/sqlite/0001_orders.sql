-- One row for each order. Paging is by the id alone: ids are UUIDv7 and grow with time.
-- Product and quantity beside the key are what a retried order is compared with.
CREATE TABLE orders (
    id BLOB PRIMARY KEY CHECK (length(id) = 16),
    product_id TEXT NOT NULL,
    quantity INTEGER NOT NULL,
    idempotency_key TEXT,
    placed_at INTEGER NOT NULL -- milliseconds since 1970
) STRICT, WITHOUT ROWID;

-- Partial: most orders have no key, and pruned keys leave the index.
CREATE UNIQUE INDEX orders_idempotency_key ON orders (idempotency_key)
    WHERE idempotency_key IS NOT NULL;
