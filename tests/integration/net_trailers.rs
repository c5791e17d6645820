//! How the answers of listeners that serve tower services end: trailers and heads alone.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use futures_util::stream;
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response};
use http_body::Frame;
use http_body_util::StreamBody;
use otpgate::config::{Address, Limits, Listen};
use otpgate::metrics::Metrics;
use otpgate::net::Listener;
use otpgate::net::service::TowerApp;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::peers::{bounded, h2peer, wire};

/// Data, then a trailer.
async fn with_trailers() -> Response<Body> {
    let trailer = (HeaderName::from_static("grpc-status"), HeaderValue::from_static("0"));
    let frames = [
        Frame::data("one ".into()),
        Frame::data("two".into()),
        Frame::trailers(HeaderMap::from_iter([trailer])),
    ];
    Response::new(Body::new(StreamBody::new(stream::iter(frames.map(Ok::<_, Infallible>)))))
}

struct Served {
    address: SocketAddr,
    stop: watch::Sender<bool>,
    task: JoinHandle<()>,
}

impl Served {
    fn start() -> Self {
        let local = Address::Tcp(([127, 0, 0, 1], 0).into());
        let listen = [Listen { h2c: true, ..Listen::at(local) }];
        let metrics = Arc::new(Metrics::new([]));
        let listener = Listener::bind("api", &listen, Limits::default(), metrics).unwrap();
        let Address::Tcp(address) = listener.addresses().remove(0) else { panic!("TCP") };
        let (stop, stopped) = watch::channel(false);
        let routes = Router::new().route("/", axum::routing::any(with_trailers));
        let app = TowerApp::new(routes.route("/empty", axum::routing::any(|| async {})));
        let task = tokio::spawn(listener.run(Arc::new(app), stopped));
        Self { address, stop, task }
    }

    async fn end(self) {
        self.stop.send_replace(true);
        bounded("the end", self.task).await.unwrap();
    }
}

#[tokio::test]
async fn http2_answers_end_with_their_trailers() {
    let served = Served::start();
    let client = h2peer::client(TcpStream::connect(served.address).await.unwrap()).await;
    let ask = |method: &str, path: &str| {
        Request::builder().method(method).uri(format!("http://a{path}")).body(()).unwrap()
    };
    let mut body = h2peer::open(&client, ask("GET", "/")).await.response.into_body();
    let mut data = Vec::new();
    while let Some(part) = h2peer::data(&mut body).await {
        data.extend_from_slice(&part);
    }
    assert_eq!(data, b"one two");
    let trailers = bounded("trailers", body.trailers()).await.unwrap().unwrap();
    assert_eq!(trailers["grpc-status"], "0");
    for (method, path) in [("GET", "/empty"), ("HEAD", "/")] {
        let body = h2peer::open(&client, ask(method, path)).await.response.into_body();
        assert!(body.is_end_stream(), "{method} {path}");
    }
    drop(client);
    served.end().await;
}

#[tokio::test]
async fn http1_answers_are_whole_without_trailers() {
    let served = Served::start();
    let mut connection = wire::Connection::to(served.address).await;
    for path in ["/", "/empty", "/"] {
        let answer =
            connection.ask(format!("GET {path} HTTP/1.1\r\nHost: a\r\n\r\n")).await.unwrap();
        assert_eq!(answer.status, 200);
        assert_eq!(answer.text(), if path == "/" { "one two" } else { "" });
        assert_eq!(answer.header("grpc-status"), None);
    }
    drop(connection);
    served.end().await;
}
