// Command http-server does what the tutorial's Go server does, its sleep set to nothing: net/http and
// client_golang, one handler under a middleware that counts and times requests by path.
package main

import (
	"log"
	"net/http"
	"strconv"

	"github.com/prometheus/client_golang/prometheus"

	"order-service-peers/place"
)

var (
	requests = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "http_requests_total_with_path", Help: "HTTP requests.",
	}, []string{"url", "method", "code"})
	seconds = prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name: "http_request_duration_seconds", Help: "Time of HTTP requests.", Buckets: place.Buckets,
	}, []string{"path", "method"})
)

type recorder struct {
	http.ResponseWriter
	status int
}

func (r *recorder) WriteHeader(status int) {
	r.status = status
	r.ResponseWriter.WriteHeader(status)
}

func measured(path string, next http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		timer := prometheus.NewTimer(seconds.WithLabelValues(path, r.Method))
		recorded := recorder{w, http.StatusOK}
		next(&recorded, r)
		timer.ObserveDuration()
		requests.WithLabelValues(path, r.Method, strconv.Itoa(recorded.status)).Inc()
	}
}

func product(w http.ResponseWriter, r *http.Request) {
	query := r.URL.Query()
	productID, quantity := query.Get("product_id"), uint64(1)
	if productID == "" {
		productID = "book"
	}
	if text := query.Get("quantity"); text != "" {
		number, err := strconv.ParseUint(text, 10, 32)
		if err != nil {
			http.Error(w, err.Error(), http.StatusUnprocessableEntity)
			return
		}
		quantity = number
	}
	order, err := place.New(productID, uint32(quantity))
	if err != nil {
		http.Error(w, err.Error(), http.StatusUnprocessableEntity)
		return
	}
	header := w.Header()
	header.Set("Content-Type", "text/plain; charset=utf-8")
	header.Set("Cache-Control", "no-store")
	header.Set("Location", "/orders/"+order.ID)
	header.Set("X-Request-Id", place.RequestID())
	header.Set("X-Served-By", place.ServedBy)
	if _, err := w.Write([]byte("Order placed!")); err != nil {
		log.Print(err)
	}
}

func main() {
	registry := prometheus.NewRegistry()
	registry.MustRegister(requests, seconds)
	address := place.Listen(registry)
	mux := http.NewServeMux()
	mux.HandleFunc("/product", measured("/product", product))
	log.Fatal(http.ListenAndServe(address, mux))
}
