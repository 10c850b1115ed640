//! Every child of the layer's families, resolved at the start: to record is to index.

use http::Method;
use prometheus::{Histogram, IntCounter, IntGauge, IntGaugeVec, Opts, Registry};
use prost::Message as _;
use prost_types::{FileDescriptorSet, MethodDescriptorProto, ServiceDescriptorProto};

use super::{
    super::{MetricsError, PROTOCOLS, child, registered},
    Recording,
    families::{GrpcFamilies, HttpFamilies},
    routes::{Route, Template},
};

/// The route of requests that match none.
pub const UNMATCHED: &str = "unmatched";

/// What is not in a closed set.
const OTHER: &str = "other";

/// gRPC's codes in the order of their numbers, spelled as in Go.
pub(super) const GRPC_CODES: [&str; 17] = [
    "OK",
    "Canceled",
    "Unknown",
    "InvalidArgument",
    "DeadlineExceeded",
    "NotFound",
    "AlreadyExists",
    "PermissionDenied",
    "ResourceExhausted",
    "FailedPrecondition",
    "Aborted",
    "OutOfRange",
    "Unimplemented",
    "Internal",
    "Unavailable",
    "DataLoss",
    "Unauthenticated",
];

/// Codes that any request may get: a bad `Host`, a panic, an overload, a deadline, a caller that
/// went away.
const ANYWHERE: [u16; 5] = [400, 499, 500, 503, 504];

/// Beside those: what a method gets that its route does not serve, and what no route gets.
const UNSERVED: [u16; 1] = [405];
const NO_ROUTE: [u16; 3] = [404, 405, 415];

#[derive(Debug)]
pub(super) struct Table {
    /// By path, in no order: a comparison ends at the length of nearly every other path. The last,
    /// of no path, is the last resort.
    grpc: Vec<(String, GrpcHandles)>,
    /// `/package.Service/` of the services that are not recorded.
    unrecorded: Vec<String>,
    /// In the order in which a path is to be tried; what fits none is unmatched.
    http: Vec<(Template, HttpRoute)>,
    unmatched: HttpRoute,
    /// In the order of `PROTOCOLS`.
    pub(super) in_flight: [IntGauge; 2],
}

#[derive(Debug)]
pub(super) struct GrpcHandles {
    pub(super) started: IntCounter,
    pub(super) received: IntCounter,
    pub(super) sent: IntCounter,
    pub(super) handled: [IntCounter; 17],
    pub(super) seconds: Histogram,
}

#[derive(Debug)]
struct HttpRoute {
    methods: Vec<(Method, HttpHandles)>,
    other: HttpHandles,
}

#[derive(Debug)]
pub(super) struct HttpHandles {
    codes: Vec<(u16, IntCounter)>,
    other: IntCounter,
    pub(super) seconds: Histogram,
}

impl HttpHandles {
    pub(super) fn code(&self, code: u16) -> &IntCounter {
        self.codes.iter().find(|(known, _)| *known == code).map_or(&self.other, |(_, found)| found)
    }
}

/// Where in the table a gRPC call is recorded.
#[derive(Debug, Clone, Copy)]
pub(super) struct GrpcIndex(usize);

/// Where in the table an HTTP request is recorded.
#[derive(Debug, Clone, Copy)]
pub(super) struct HttpIndex {
    route: usize,
    method: usize,
}

impl Table {
    pub(super) fn new(registry: &Registry, recording: Recording<'_>) -> Result<Self, MetricsError> {
        let families = GrpcFamilies::new()?;
        let mut grpc = Vec::new();
        for descriptors in recording.descriptors {
            for (name, service) in services(descriptors)? {
                for method in &service.method {
                    let path = format!("/{name}/{}", method.name());
                    let labels = [kind(method), &name, method.name()];
                    grpc.push((path, GrpcHandles::new(&families, labels)?));
                }
            }
        }
        grpc.push((String::new(), GrpcHandles::new(&families, ["unary", OTHER, OTHER])?));
        registry.register(Box::new(families))?;

        let families = HttpFamilies::new()?;
        // The closed set of methods: what any route serves, and HEAD.
        let mut served = vec![Method::HEAD];
        for (method, _) in recording.routes.iter().flat_map(|route| &route.methods) {
            if !served.contains(method) {
                served.push(method.clone());
            }
        }
        let mut http = Vec::new();
        for Route { path, methods } in recording.routes {
            let codes = |method: &Method| {
                let own = methods.iter().find(|(served, _)| served == method);
                own.map_or(&UNSERVED[..], |(_, codes)| codes)
            };
            let route = HttpRoute::new(&families, path, &served, codes)?;
            http.push((Template::parse(path)?, route));
        }
        http.sort_by(|(one, _), (other, _)| one.cmp(other));
        let unmatched = HttpRoute::new(&families, UNMATCHED, &served, |_| &NO_ROUTE)?;
        registered(registry, families.requests)?;
        registered(registry, families.seconds)?;

        let in_flight = registered(
            registry,
            IntGaugeVec::new(
                Opts::new("requests_in_flight", "Requests that arrived and have not ended."),
                &["protocol"],
            )?,
        )?;
        let in_flight = [child(&in_flight, &[PROTOCOLS[0]])?, child(&in_flight, &[PROTOCOLS[1]])?];
        let unrecorded = recording.unrecorded.iter().map(|name| format!("/{name}/")).collect();
        Ok(Self { grpc, unrecorded, http, unmatched, in_flight })
    }

    /// `None` if the call is not recorded.
    pub(super) fn find_grpc(&self, path: &str) -> Option<GrpcIndex> {
        let found = self.grpc.iter().position(|(known, _)| known == path);
        if found.is_none() && self.unrecorded.iter().any(|service| path.starts_with(service)) {
            return None;
        }
        Some(GrpcIndex(found.unwrap_or(self.grpc.len() - 1)))
    }

    pub(super) fn grpc(&self, GrpcIndex(index): GrpcIndex) -> &GrpcHandles {
        &self.grpc[index].1
    }

    pub(super) fn find_http(&self, path: &str, method: &Method) -> HttpIndex {
        let route = self.http.iter().position(|(template, _)| template.fits(path));
        let route = route.unwrap_or(self.http.len());
        let methods = &self.route(route).methods;
        let method = methods.iter().position(|(known, _)| known == method);
        HttpIndex { route, method: method.unwrap_or(methods.len()) }
    }

    pub(super) fn http(&self, HttpIndex { route, method }: HttpIndex) -> &HttpHandles {
        let route = self.route(route);
        route.methods.get(method).map_or(&route.other, |(_, handles)| handles)
    }

    fn route(&self, index: usize) -> &HttpRoute {
        self.http.get(index).map_or(&self.unmatched, |(_, route)| route)
    }
}

impl GrpcHandles {
    fn new(families: &GrpcFamilies, labels: [&str; 3]) -> Result<Self, MetricsError> {
        let [kind, service, method] = labels;
        let mut handled = Vec::new();
        for code in GRPC_CODES {
            handled.push(child(&families.handled, &[kind, service, method, code])?);
        }
        Ok(Self {
            started: child(&families.started, &labels)?,
            received: child(&families.received, &labels)?,
            sent: child(&families.sent, &labels)?,
            handled: handled.try_into().expect("as many as there are codes"),
            seconds: child(&families.seconds, &labels)?,
        })
    }
}

impl HttpRoute {
    fn new<'c>(
        families: &HttpFamilies,
        path: &str,
        served: &[Method],
        codes: impl Fn(&Method) -> &'c [u16],
    ) -> Result<Self, MetricsError> {
        let handles = |method: &str, codes: &[u16]| -> Result<HttpHandles, MetricsError> {
            let mut all: Vec<u16> = [codes, &ANYWHERE].concat();
            all.sort_unstable();
            all.dedup();
            let mut children = Vec::new();
            for code in all {
                let labels = [path, method, &code.to_string()];
                children.push((code, child(&families.requests, &labels)?));
            }
            Ok(HttpHandles {
                codes: children,
                other: child(&families.requests, &[path, method, OTHER])?,
                seconds: child(&families.seconds, &[path, method])?,
            })
        };
        let mut methods = Vec::new();
        for method in served {
            methods.push((method.clone(), handles(method.as_str(), codes(method))?));
        }
        // Spelled so, it is no method of HTTP's.
        let other = handles("OTHER", if path == UNMATCHED { &NO_ROUTE } else { &UNSERVED })?;
        Ok(Self { methods, other })
    }
}

/// The services in an encoded `FileDescriptorSet`, with their full names.
///
/// # Errors
/// If it is none.
pub fn services(descriptors: &[u8]) -> Result<Vec<(String, ServiceDescriptorProto)>, MetricsError> {
    let set = FileDescriptorSet::decode(descriptors)?;
    let mut services = Vec::new();
    for mut file in set.file {
        for service in std::mem::take(&mut file.service) {
            let name = match file.package() {
                "" => service.name().to_owned(),
                package => format!("{package}.{}", service.name()),
            };
            services.push((name, service));
        }
    }
    Ok(services)
}

fn kind(method: &MethodDescriptorProto) -> &'static str {
    match (method.client_streaming(), method.server_streaming()) {
        (false, false) => "unary",
        (true, false) => "client_stream",
        (false, true) => "server_stream",
        (true, true) => "bidi_stream",
    }
}
