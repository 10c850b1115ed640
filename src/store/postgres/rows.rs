//! Orders to the parameters of statements, and rows of PostgreSQL to orders.

use sqlx::{
    Row as _, TypeInfo as _, ValueRef as _,
    postgres::{PgConnection, PgRow},
};
use uuid::Uuid;

use super::INSERT;
use crate::{
    order::{IdempotencyKey, OrderId},
    store::{
        NewOrder,
        rows::{Stored, millis},
    },
};

/// Inserts those of a batch that are not there yet; returns how many were inserted.
pub(super) async fn insert(
    connection: &mut PgConnection,
    batch: &[NewOrder],
) -> Result<usize, sqlx::Error> {
    let products: Vec<&str> = batch.iter().map(|new| new.order.product_id.as_str()).collect();
    let quantities: Vec<i32> = batch.iter().map(|new| new.order.quantity.get().into()).collect();
    let placed: Vec<i64> = batch.iter().map(|new| millis(new.order.placed_at)).collect();
    let insert = sqlx::query(INSERT)
        .bind(ids(batch))
        .bind(products)
        .bind(quantities)
        .bind(keys(batch))
        .bind(placed);
    Ok(insert.fetch_all(connection).await?.len())
}

pub(super) fn ids(batch: &[NewOrder]) -> Vec<Uuid> {
    batch.iter().map(|new| uuid(new.order.id)).collect()
}

pub(super) fn keys(batch: &[NewOrder]) -> Vec<Option<&str>> {
    batch.iter().map(|new| new.key.as_ref().map(IdempotencyKey::as_str)).collect()
}

pub(super) fn uuid(id: OrderId) -> Uuid {
    Uuid::from_bytes(*id.as_bytes())
}

pub(super) fn stored_row(row: &PgRow) -> Result<Stored, sqlx::Error> {
    let id: Uuid = row.try_get("id")?;
    let product_id: String = row.try_get("product_id")?;
    let (quantity, placed_at) = (integer(row, "quantity")?, integer(row, "placed_at")?);
    Ok(Stored::new(
        id.into_bytes(),
        &product_id,
        quantity,
        row.try_get("idempotency_key")?,
        placed_at,
    ))
}

/// An integer of any size: an administrator may have widened the column.
fn integer(row: &PgRow, column: &str) -> Result<i64, sqlx::Error> {
    match row.try_get_raw(column)?.type_info().name() {
        "INT2" => row.try_get::<i16, _>(column).map(i64::from),
        "INT4" => row.try_get::<i32, _>(column).map(i64::from),
        _ => row.try_get(column),
    }
}
