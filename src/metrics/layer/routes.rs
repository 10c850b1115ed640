//! Which HTTP route a path belongs to, decided as axum's router decides it: the layer is outside of
//! the router, where no route has been chosen yet.

use http::Method;

use super::super::MetricsError;

/// An HTTP route.
#[derive(Debug, Clone)]
pub struct Route {
    pub(super) path: &'static str,
    pub(super) methods: Vec<(Method, &'static [u16])>,
}

impl Route {
    /// The template of a route as axum writes it, such as `/orders/{order_id}` or `/files/{*path}`,
    /// and the methods it serves, each with the codes that it can answer with; 400, 499, 500, 503
    /// and 504 are always among them.
    pub fn new(path: &'static str, methods: &[(Method, &'static [u16])]) -> Self {
        Self { path, methods: methods.to_vec() }
    }
}

/// A parsed template. The least is the one to be tried first: where a path fits several, the router
/// prefers the one that is literal where the others first are not.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Template {
    /// Before the segments, since it decides the order: a path that is spelled out wins.
    has_parameters: bool,
    segments: Vec<Segment>,
    text: &'static str,
}

#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Segment {
    Literal(&'static str),
    /// `{name}`: one segment, which the router takes for empty only where another follows.
    Parameter,
    /// `{*name}`: all that is left, if that is not empty.
    Rest,
}

impl Template {
    /// # Errors
    /// If a parameter is not all of its segment, or something follows one that takes the rest.
    pub(super) fn parse(text: &'static str) -> Result<Self, MetricsError> {
        let refused = || MetricsError::Template(text.to_owned());
        let mut segments = Vec::new();
        for segment in text.split('/') {
            let name = segment.strip_prefix('{').and_then(|segment| segment.strip_suffix('}'));
            let (parsed, name) = match name.map(|name| name.strip_prefix('*').ok_or(name)) {
                None => (Segment::Literal(segment), segment),
                Some(Err(name)) => (Segment::Parameter, name),
                Some(Ok(name)) => (Segment::Rest, name),
            };
            let is_named = !name.is_empty() || matches!(parsed, Segment::Literal(_));
            if name.contains(['{', '}']) || !is_named || segments.last() == Some(&Segment::Rest) {
                return Err(refused());
            }
            segments.push(parsed);
        }
        if !text.starts_with('/') {
            return Err(refused());
        }
        let has_parameters = !segments.iter().all(|s| matches!(s, Segment::Literal(_)));
        Ok(Self { has_parameters, segments, text })
    }

    /// Whether a path, still percent-encoded, is of this template.
    pub(super) fn fits(&self, path: &str) -> bool {
        if !self.has_parameters {
            return self.text == path;
        }
        let mut rest = Some(path);
        for segment in &self.segments {
            let Some(left) = rest else { return false };
            let (given, after) = match left.split_once('/') {
                Some((given, after)) => (given, Some(after)),
                None => (left, None),
            };
            let fits = match segment {
                Segment::Literal(literal) => given == *literal,
                Segment::Parameter => !given.is_empty() || after.is_some(),
                Segment::Rest => return !left.is_empty(),
            };
            if !fits {
                return false;
            }
            rest = after;
        }
        rest.is_none()
    }
}

#[cfg(test)]
mod tests {
    use axum::{Router, body::Body, extract::MatchedPath, routing::get};
    use http::Request;
    use http_body_util::BodyExt as _;
    use proptest::prelude::*;
    use tower::ServiceExt as _;

    use super::*;

    /// Overlapping on purpose.
    const TEMPLATES: [&str; 11] = [
        "/",
        "/product",
        "/orders",
        "/orders/{order_id}",
        "/orders/{order_id}/items",
        "/orders/new/{kind}",
        "/orders/{order_id}/items/{item_id}",
        "/files/{*path}",
        "/files/new/x",
        "/files/new/{name}",
        "/x/{*rest}",
    ];

    /// What axum's router makes of a path.
    async fn of_axum(router: &Router, path: &str) -> String {
        let request = Request::get(path).body(Body::empty()).unwrap();
        let body = router.clone().oneshot(request).await.unwrap().into_body();
        String::from_utf8(body.collect().await.unwrap().to_bytes().to_vec()).unwrap()
    }

    fn of_ours(templates: &[Template], path: &str) -> &'static str {
        templates
            .iter()
            .find(|template| template.fits(path))
            .map_or("none", |template| template.text)
    }

    fn both() -> (Router, Vec<Template>) {
        let router = TEMPLATES.into_iter().fold(Router::new(), |router, template| {
            router.route(template, get(async |path: MatchedPath| path.as_str().to_owned()))
        });
        let mut templates = TEMPLATES.map(|text| Template::parse(text).unwrap());
        templates.sort();
        (router.fallback(async || "none"), templates.into())
    }

    fn paths() -> impl Strategy<Value = String> {
        let segment = prop::sample::select(vec![
            "",
            "product",
            "orders",
            "new",
            "items",
            "files",
            "x",
            "%2F",
            "%ff",
            "{order_id}",
            "%6Frders",
            ".",
            "..",
            "a%20b",
            "PRODUCT",
        ]);
        prop::collection::vec(segment, 0..6).prop_map(|segments| format!("/{}", segments.join("/")))
    }

    #[tokio::test]
    async fn a_parameter_is_empty_where_the_routers_is() {
        let (router, templates) = both();
        for (path, template) in [
            ("/orders//items", "/orders/{order_id}/items"),
            ("/orders//items/x", "/orders/{order_id}/items/{item_id}"),
            ("/orders//items/", "none"),
            ("/orders//", "none"),
            ("/orders/", "none"),
        ] {
            assert_eq!(of_axum(&router, path).await, template, "{path}");
            assert_eq!(of_ours(&templates, path), template, "{path}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4096))]

        #[test]
        fn the_route_of_a_path_is_the_routers(path in paths()) {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            // `{` is no character of a path.
            let path = path.replace(['{', '}'], "_");
            let (router, templates) = both();
            let routed = runtime.block_on(of_axum(&router, &path));
            prop_assert_eq!(of_ours(&templates, &path), routed, "{}", path);
        }
    }

    #[test]
    fn what_is_no_template_is_refused() {
        for text in ["", "product", "/a{b}", "/{a}b", "/{}", "/{*}", "/{*rest}/x", "/{{a}}", "/}"] {
            let refused = Template::parse(text);
            assert!(matches!(refused, Err(MetricsError::Template(_))), "{text}: {refused:?}");
        }
    }
}
