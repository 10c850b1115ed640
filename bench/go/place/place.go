// Package place is the work that both servers do for an order, and what they tell of it: the rules,
// the fields and the histogram buckets of order-service.
package place

import (
	"flag"
	"fmt"
	"log"
	"net/http"
	"os"
	"regexp"
	"time"

	"github.com/google/uuid"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// Buckets are those of order-service's histograms, in seconds.
var Buckets = []float64{
	0.0005, 0.00075, 0.001, 0.0015, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.025, 0.05, 0.075, 0.1,
	0.125, 0.15, 0.2, 0.3, 0.5, 1, 2.5, 5, 10,
}

// Placed counts orders, under the name that the autoscaler knows.
var Placed = prometheus.NewCounter(prometheus.CounterOpts{
	Name: "product_order_total", Help: "Orders.",
})

// ServedBy is the value of x-served-by.
var ServedBy = servedBy()

var product = regexp.MustCompile(`^[A-Za-z0-9._-]{1,64}$`)

// Order is an order that was checked.
type Order struct {
	ID       string
	Product  string
	Quantity uint32
	At       time.Time
}

// New checks the fields and makes an order of them.
func New(productID string, quantity uint32) (Order, error) {
	if !product.MatchString(productID) {
		return Order{}, fmt.Errorf("product_id %q: expected 1 to 64 characters of A-Z a-z 0-9 . _ -", productID)
	}
	if quantity < 1 || quantity > 10000 {
		return Order{}, fmt.Errorf("quantity %d: expected 1 to 10000", quantity)
	}
	id, err := uuid.NewV7()
	if err != nil {
		return Order{}, err
	}
	Placed.Inc()
	return Order{id.String(), productID, quantity, time.Now().Truncate(time.Millisecond)}, nil
}

// RequestID is a new value of x-request-id.
func RequestID() string {
	id := uuid.Must(uuid.NewV7())
	return fmt.Sprintf("%x", id[:])
}

// Listen reads the two addresses from the flags and serves the metrics on the second.
func Listen(registry *prometheus.Registry) (address string) {
	listen := flag.String("listen", "127.0.0.1:0", "address of the API")
	admin := flag.String("admin-listen", "127.0.0.1:0", "address of /metrics")
	flag.Parse()
	registry.MustRegister(Placed)
	mux := http.NewServeMux()
	mux.Handle("/metrics", promhttp.HandlerFor(registry, promhttp.HandlerOpts{}))
	go func() { log.Fatal(http.ListenAndServe(*admin, mux)) }()
	return *listen
}

func servedBy() string {
	host, _ := os.Hostname()
	return fmt.Sprintf("%s:%d", host, os.Getpid())
}
